"""Tells the kinds of rows that supervised fine-tuning takes, and what is wrong with a row that is none of them."""

from collections.abc import Mapping
from typing import Any

from slsam_peft.data.strict_json import read_json, reason_of
from slsam_peft.names import hint_at

COLUMNS = ("input_ids", "prompt", "completion", "messages", "conversations")

# Columns of which each kind consists. What else a row has under one of these names would make TRL take it for a row
# of another kind, or add the end token to the wrong text.
FORMS: dict[str, tuple[str, ...]] = {
    "tokenized": ("input_ids",),
    "prompt-completion": ("prompt", "completion"),
    "conversational prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}
TEMPLATE_OPTIONS = "chat_template_kwargs"  # a column: what a row's chat template is given
TOOLS = "tools"  # a column: the tools that a conversation may call, as objects or as their JSON text

# What the trainer says itself when it has a chat template written, and what would change the form of what comes back.
RESERVED = (
    *("self", "conversation", "conversations", "messages", "input", "processing_class", "add_generation_prompt"),
    *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length"),
)

# The roles that chat templates know: everybody's, Llama's name of a tool, Granite's parts of a prompt.
ROLES = ("system", "user", "assistant", "tool", "ipython", "control", "document")

# Columns with one value for each token.
PER_TOKEN = ("labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "token_type_ids")


class RowError(ValueError):
    """A row is of no kind that supervised fine-tuning takes; the message says why, without a place."""

    @property
    def sentence(self) -> str:
        """The message, closed by a full stop unless it ends with a question."""
        return str(self) if str(self).endswith("?") else f"{self}."


def needed_columns(text_field: str = "text") -> str:
    """Return the columns a training row may consist of, as a phrase for errors."""
    return f"'messages' (a list of role and content), 'prompt' and 'completion', or '{text_field}'"


def kind_of(row: Mapping[str, Any], text_field: str = "text") -> str:
    """Return what kind of training row this is, by the same order of columns as TRL's `SFTTrainer`.

    Args:
        row (`Mapping[str, Any]`): Column name to value; `None` counts as absent. Other spellings than TRL's are turned
            into its own before, by `slsam_peft.data.spellings`.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `str`: `"tokenized"`, `"prompt-completion"`, `"conversational prompt-completion"`, `"messages"` or `"text"`.

    Raises:
        RowError: the row has none of these forms; the message says what is wrong.
    """
    present = {name: value for name, value in row.items() if value is not None}
    kind = _kind(present, row, text_field)
    _check_template_columns(present, kind)
    return kind


def _kind(present: Mapping[str, Any], row: Mapping[str, Any], text_field: str) -> str:
    """Return the kind of a row by the columns of it that are present, without those that its template is given."""
    if "input_ids" in present:
        _check_token_ids(present)
        return "tokenized"
    if "prompt" in present or "completion" in present:
        return _prompt_completion(present)
    if "messages" in present:
        _check_messages("messages", present["messages"])
        return "messages"
    if text_field in present:
        _require_text(text_field, present[text_field])
        return "text"
    raise RowError(_no_columns(row, text_field))


def columns_of(kind: str, text_field: str = "text") -> tuple[str, ...]:
    """Return the columns that a row of a kind consists of."""
    return (text_field,) if kind == "text" else FORMS[kind]


def left_out(names: Mapping[str, Any], kind: str, text_field: str = "text") -> list[str]:
    """Return which of a row's columns are a part of another kind of row, and must not come with it."""
    if kind == "tokenized":  # TRL looks at nothing else
        return []
    kept = columns_of(kind, text_field)
    parts = {*COLUMNS, text_field, "chosen", "rejected", *PER_TOKEN}
    return [name for name in names if name in parts and name not in kept]


def _no_columns(row: Mapping[str, Any], text_field: str) -> str:
    empty = [name for name in (*COLUMNS, text_field) if name in row]
    if empty:
        return f"'{empty[0]}' is null; a row needs {needed_columns(text_field)}"
    # Whoever has token ids knows their column's name; "input" is nearest to it, and means a prompt.
    offered = [name for name in (*COLUMNS, text_field) if name != "input_ids"]
    hint = next(filter(None, (hint_at(name, offered) for name in row)), "")
    found = ", ".join(repr(name) for name in row) or "none"
    return f"the columns are {found}; a row needs {needed_columns(text_field)}{hint and '.' + hint}"


def _prompt_completion(row: Mapping[str, Any]) -> str:
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if name not in row:
            hint = next(filter(None, (hint_at(key, [name]) for key in row if key not in COLUMNS)), "")
            raise RowError(f"'{other}' without '{name}'; a prompt-completion row needs both{hint and '.' + hint}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return "prompt-completion"
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("'prompt' and 'completion' must both be texts, or both lists of messages")
    _check_messages("prompt", prompt)
    _check_messages("completion", completion)
    return "conversational prompt-completion"


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"'{name}' must be a text, not {type_name(value)}")


def _check_template_columns(row: Mapping[str, Any], kind: str) -> None:
    """Check what a row's chat template is given, as far as it comes to that."""
    options = row.get(TEMPLATE_OPTIONS, {})
    if not isinstance(options, dict):
        raise RowError(f"'{TEMPLATE_OPTIONS}' must be an object, not {type_name(options)}")
    if kind == "tokenized":
        return
    # TRL reads a text as JSON whatever kind of row it stands in.
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        tools = _tools_of(tools)
    if kind not in ("messages", "conversational prompt-completion"):
        return
    _check_objects(f"'{TOOLS}'", tools)
    for name in (TOOLS, "documents"):
        _check_objects(f"'{TEMPLATE_OPTIONS}' has {name!r}, which", options.get(name))
    template = options.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise RowError(f"'{TEMPLATE_OPTIONS}' has 'chat_template', which must be a text, not {type_name(template)}")
    taken = [name for name in options if name in RESERVED]
    if taken:
        raise RowError(
            f"'{TEMPLATE_OPTIONS}' has {taken[0]!r}, which training says itself; keep to what the chat template "
            "knows by other names, and leave this one out"
        )


def _tools_of(text: str) -> Any:
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"'{TOOLS}' is a text that is no JSON: {reason_of(error)}; write a list of objects, or its JSON text"
        ) from None


def _check_objects(what: str, value: Any) -> None:
    """Check that a value is a list of objects, or null."""
    if value is None:
        return
    if not isinstance(value, list):
        raise RowError(f"{what} must be a list of objects, not {type_name(value)}")
    for entry in value:
        if not isinstance(entry, dict):
            raise RowError(f"{what} must be a list of objects, and holds {type_name(entry)}")


def _check_token_ids(row: Mapping[str, Any]) -> None:
    """Check that there are tokens, and one value for each of them in the columns beside them."""
    value = row["input_ids"]
    if not _is_integers(value) or not value:
        raise RowError("'input_ids' must be a list of one or more integers")
    if min(value) < 0:
        raise RowError(f"'input_ids' holds {min(value)}; a token's id is 0 or more")
    for name in PER_TOKEN:
        if name in row and not (_is_integers(row[name]) and len(row[name]) == len(value)):
            raise RowError(f"'{name}' must be a list of {len(value)} integers, one for each of 'input_ids'")


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _check_messages(name: str, value: Any) -> None:
    for position, message in enumerate(require_messages(name, value), 1):
        _check_message(f"'{name}', message {position}", message)


def require_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Return a column's messages.

    Raises:
        RowError: it is no list of one or more objects.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type_name(value)
        raise RowError(f"'{name}' must be a list of one or more messages, not {what}")
    for position, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RowError(f"'{name}', message {position} must be an object, not {type_name(message)}")
    return value


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    # Who speaks.
    role = message.get("role")
    if not isinstance(role, str):
        found = ", ".join(repr(key) for key in message) or "none"
        raise RowError(f"{where} needs a 'role' that is a text; its keys are {found}")
    if role not in ROLES:
        raise RowError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    # What is said.
    value = message.get("content")
    calls_tool = value is None and message.get("tool_calls")
    if not calls_tool and not isinstance(value, str | list):
        raise RowError(f"{where} needs a 'content' that is a text or a list of parts, not {type_name(value)}")
    for part in value if isinstance(value, list) else ():
        if not isinstance(part, dict):
            raise RowError(f"{where} has a content of parts, and one is {type_name(part)} instead of an object")
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise RowError(f"{where} has a part of type 'text' whose 'text' is {type_name(part.get('text'))}")
    # What is called: an object for each tool.
    _check_objects(f"{where} has 'tool_calls', which", message.get("tool_calls") or None)
    for position, call in enumerate(message.get("tool_calls") or (), 1):
        arguments = called(call).get("arguments")
        if arguments is not None and not isinstance(arguments, dict):
            raise RowError(
                f"{where}, tool call {position} has arguments that are {type_name(arguments)}; write them as an object"
            )
    # What no chat template knows, and nobody would miss until the model has learnt without it.
    weight = message.get("weight")
    if weight is not None and weight != 1:
        raise RowError(
            f"{where} has the weight {weight!r}, and training does not weigh messages; give the ones that count as "
            "'completion' and the others as 'prompt', or set assistant_only_loss"
        )
    if message.get("function_call") is not None:
        raise RowError(f"{where} has a 'function_call', which chat templates do not know; write it as 'tool_calls'")


def called(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a tool call that has its name and its arguments: its function, or all of it."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def type_name(value: Any) -> str:
    """Return what a JSON value is, as a phrase for errors."""
    names = {
        str: "a text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        type(None): "null",
    }
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
