"""Turns the usual spellings of training rows (ShareGPT, Alpaca, OpenAI's messages) into the ones that TRL takes.

TRL renames 'from' and 'value' in one column and nothing else: roles that no chat template knows, a system prompt in a
column of its own and arguments that are JSON texts would reach the template, or get lost, without a word.
"""

from collections.abc import Mapping
from typing import Any

from slsam_peft.data.rows import (
    COLUMNS,
    PER_TOKEN,
    TEMPLATE_OPTIONS,
    TOOLS,
    RowError,
    called,
    kind_of,
    left_out,
    require_messages,
    type_name,
)
from slsam_peft.data.strict_json import read_json, reason_of

Row = dict[str, Any]

# What each role is called elsewhere.
_ROLES = {
    "system": "developer",
    "user": "human",
    "assistant": "gpt chatgpt bard bing claude model bot ai",
    "tool": "function observation function_response",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in (role, *names.split())}

_CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_ALPACA = ("instruction", "output")

SHAREGPT = "ShareGPT's 'from' and 'value' into 'role' and 'content'"
ALPACA = "Alpaca's 'instruction', 'input' and 'output' into 'prompt' and 'completion'"
RENAMED = "'conversations' into 'messages'"
ROLE_NAMES = "roles into system, user, assistant and tool"
SYSTEM_COLUMN = "the column of system prompts into a first message"
ARGUMENTS = "arguments of tool calls from JSON texts into objects"


def deciding_columns(text_field: str = "text") -> tuple[str, ...]:
    """Return every column that a `Converter` reads or changes."""
    alpaca = (*_ALPACA, "input", "history")
    return (*COLUMNS, *_CONVERSATIONS, *_SYSTEM, *alpaca, *PER_TOKEN, TEMPLATE_OPTIONS, TOOLS, text_field)


class Converter:
    """Converts rows one by one, and knows what it has converted.

    Args:
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Attributes:
        converted (`dict[str, None]`): What was converted, as phrases in order of appearance.
        dropped (`dict[str, None]`): Columns that were left out since they are a part of another kind of row.
    """

    def __init__(self, text_field: str = "text") -> None:
        self.text_field = text_field
        self.converted: dict[str, None] = {}
        self.dropped: dict[str, None] = {}

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, Row]:
        """Return the kind of a row and the row as TRL takes it: unchanged where it is spelled so already.

        Raises:
            RowError: it is no training row, see `kind_of`.
        """
        # The columns of which the row consists, under TRL's names.
        made = dict(row)
        if made.get("input_ids") is None:
            self._choose(made)
            for name in ("prompt", "completion", "messages"):
                if isinstance(made.get(name), list):
                    made[name] = self._messages(name, made[name])
            self._take_system(made)
        if TEMPLATE_OPTIONS in made and made[TEMPLATE_OPTIONS] is None:
            made[TEMPLATE_OPTIONS] = {}  # TRL unpacks it
        # The others, as long as TRL does not take them for something else.
        kind = kind_of(made, self.text_field)
        for name in left_out(made, kind, self.text_field):
            if made.pop(name) is not None:
                self.dropped[name] = None
        return kind, made

    def sentences(self) -> list[str]:
        """Return what there is to say of all rows so far."""
        said = []
        if self.converted:
            said.append(f"rows were converted: {'; '.join(self.converted)}.")
        if self.dropped:
            names = ", ".join(map(repr, self.dropped))
            said.append(f"not trained on: {names}, since the rows have other columns that are.")
        return said

    def _choose(self, row: Row) -> None:
        """Put a conversation or an Alpaca row where TRL looks for it, unless the row has such columns already."""
        if row.get("prompt") is not None and row.get("completion") is not None:
            return
        name = next((n for n in _CONVERSATIONS if row.get(n) is not None), None)
        if row.get("messages") is None and name is not None and (name != "conversation" or _is_list(row[name])):
            row["messages"] = require_messages(name, row.pop(name))
            self.converted[RENAMED] = None
        if row.get("messages") is not None:
            # One that stands beside a conversation is its first question again.
            if isinstance(row.get("prompt"), str) and row.get("completion") is None:
                del row["prompt"]
                self.dropped["prompt"] = None
        elif all(row.get(n) is not None for n in _ALPACA) and row.get(self.text_field) is None:
            self._alpaca(row)

    def _alpaca(self, row: Row) -> None:
        for name in ("instruction", "input", "output"):
            if row.get(name) is not None and not isinstance(row[name], str):
                raise RowError(f"'{name}' must be a text, not {type_name(row[name])}")
        question, more, answer = (row.pop(name, None) for name in ("instruction", "input", "output"))
        turns = []
        for turn in row.pop("history", None) or ():
            if not (_is_list(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise RowError("'history' must be a list of pairs of texts, a question and its answer")
            turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        asked = f"{question}\n{more}" if more else question
        row["prompt"] = [*turns, {"role": "user", "content": asked}]
        row["completion"] = [{"role": "assistant", "content": answer}]
        self.converted[ALPACA] = None

    def _messages(self, name: str, messages: Any) -> list[Row]:
        return [
            self._message(f"'{name}', message {i}", message) if isinstance(message, dict) else message
            for i, message in enumerate(messages, 1)
        ]

    def _message(self, where: str, message: Row) -> Row:
        made: Row = message
        for old, new in (("from", "role"), ("value", "content")):
            if made.get(old) is None:
                continue
            if made.get(new) is not None:
                raise RowError(f"{where} has both {old!r} and {new!r}; leave one out")
            made = {new if key == old else key: value for key, value in made.items() if key != new}
            self.converted[SHAREGPT] = None
        if made is not message:  # the other one is null, as in tables whose rows share their keys
            made = {key: value for key, value in made.items() if key not in ("from", "value")}
        role = made.get("role")
        known = _ROLE_OF.get(role.strip().lower(), role) if isinstance(role, str) else role
        if known != role:
            made = made | {"role": known}
            self.converted[ROLE_NAMES] = None
        return self._tool_calls(where, made)

    def _tool_calls(self, where: str, message: Row) -> Row:
        """Turn arguments that are JSON texts, as OpenAI has them, into the objects that chat templates print."""
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            return message
        made = [self._call(f"{where}, tool call {i}", call) for i, call in enumerate(calls, 1)]
        return message if made == calls else message | {"tool_calls": made}

    def _call(self, where: str, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        function = called(call)
        if not isinstance(arguments := function.get("arguments"), str):
            return call
        try:
            # Tools that take nothing are called with an empty text.
            read = read_json(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where} has arguments that are no JSON: {reason_of(error)}; write an object") from None
        self.converted[ARGUMENTS] = None
        made = {**function, "arguments": read}  # what is read and is no object is refused with the row's kind
        return made if function is call else call | {"function": made}

    def _take_system(self, row: Row) -> None:
        """Put a system prompt that stands in a column of its own into the conversation."""
        name = next((n for n in ("prompt", "messages") if row.get(n) is not None), None)
        column = next((n for n in _SYSTEM if n in row), None)
        if name is None or column is None:
            return
        text = row[column]
        if not _is_list(row[name]):  # plain texts have no place for it
            if text:
                self.dropped[column] = None
            return
        if text is not None and not isinstance(text, str):
            raise RowError(f"'{column}' must be a text, not {type_name(text)}")
        del row[column]
        if not text:
            return
        first = row[name][0] if row[name] else None
        if isinstance(first, dict) and first.get("role") == "system":
            if first.get("content") != text:
                raise RowError(f"'{column}' and the first message are two different system prompts; leave one out")
            return
        row[name] = [{"role": "system", "content": text}, *row[name]]
        self.converted[SYSTEM_COLUMN] = None


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
