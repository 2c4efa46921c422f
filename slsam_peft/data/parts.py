"""Makes plain texts of contents that are lists of parts, for chat templates that know texts alone.

A template for texts writes a list as Python shows it, "[{'type': 'text', 'text': ...}]", and training learns that.
"""

import logging
from typing import Any

from slsam_peft.data.rows import RowError
from slsam_peft.data.spellings import Row
from slsam_peft.data.tables import changed, is_table

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "completion", "messages")
_PROBE = "probe"


def without_parts(data: Any, tokenizer: Any) -> Any:
    """Return rows whose contents the tokenizer's chat template can take.

    Args:
        data (`Dataset` or `IterableDataset`): Rows in TRL's spelling, see `slsam_peft.data.load`.
        tokenizer (`PreTrainedTokenizerBase`): The model's. A processor, which takes pictures, is no such.

    Raises:
        UserError: a content has a part that is no text; the message says where.
    """
    if not getattr(tokenizer, "chat_template", None) or takes_parts(tokenizer):
        return data
    if is_table(data) and not any(_has_parts(dict(row)) for row in _conversations(data)):
        return data
    made = changed(data, as_texts, _COLUMNS)
    if is_table(data):
        logger.warning("rows were converted: contents that are lists of texts into texts, which the template takes.")
    return made


def takes_parts(tokenizer: Any) -> bool:
    """Return whether a chat template writes a content of parts as the text in it."""
    messages = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template raises whatever it wants
        return False
    return _PROBE in written and "'type'" not in written and '"type"' not in written


def as_texts(row: Row) -> Row:
    """Return a row whose contents are texts; parts are joined by newlines.

    Raises:
        RowError: a part is no text.
    """
    made = dict(row)
    for name in _COLUMNS:
        if isinstance(made.get(name), list):
            made[name] = [_message(f"'{name}', message {i}", message) for i, message in enumerate(made[name], 1)]
    return made


def _message(where: str, message: Row) -> Row:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError(
                f"{where} has a part of type {kind!r}, and the chat template of this model takes texts only"
            )
    return message | {"content": "\n".join(part["text"] for part in content)}


def _conversations(data: Any) -> Any:
    names = [name for name in data.column_names if name in _COLUMNS]
    return data.select_columns(names) if names else ()


def _has_parts(row: Row) -> bool:
    columns = (row[name] for name in row if isinstance(row[name], list))
    return any(isinstance(message.get("content"), list) for column in columns for message in column)
