"""Tells the kinds of rows that supervised fine-tuning takes, and what is wrong with a row that is none of them."""

from collections.abc import Mapping
from typing import Any

from slsam_peft.config import hint_at

COLUMNS = ("input_ids", "prompt", "completion", "messages", "conversations")


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
        row (`Mapping[str, Any]`): Column name to value; `None` counts as absent.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `str`: `"tokenized"`, `"prompt-completion"`, `"conversational prompt-completion"`, `"messages"`,
        `"conversations"` or `"text"`.

    Raises:
        RowError: the row has none of these forms; the message says what is wrong.
    """
    present = {name: value for name, value in row.items() if value is not None}
    if "input_ids" in present:
        _check_token_ids(present["input_ids"])
        return "tokenized"
    if "prompt" in present or "completion" in present:
        return _prompt_completion(present)
    for name in ("messages", "conversations"):
        if name in present:
            _check_messages(name, present[name])
            return name
    if text_field in present:
        _require_text(text_field, present[text_field])
        return "text"
    raise RowError(_no_columns(row, text_field))


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


def _check_token_ids(value: Any) -> None:
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise RowError("'input_ids' must be a list of one or more integers")


def _check_messages(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type_name(value)
        raise RowError(f"'{name}' must be a list of one or more messages, not {what}")
    for position, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise RowError(f"'{name}', message {position} must be an object, not {type_name(message)}")
        _check_message(f"'{name}', message {position}", message)


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    role, content = ("from", "value") if message.get("from") is not None else ("role", "content")
    if not isinstance(message.get(role), str):
        found = ", ".join(repr(key) for key in message) or "none"
        raise RowError(f"{where} needs a '{role}' that is a text; its keys are {found}")
    value = message.get(content)
    calls_tool = value is None and message.get("tool_calls")
    if not calls_tool and not isinstance(value, str | list):
        raise RowError(f"{where} needs a '{content}' that is a text or a list of parts, not {type_name(value)}")


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
