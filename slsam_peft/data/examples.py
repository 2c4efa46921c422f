"""Turns the rows of a data set into tokens, of which those of the answers count, or all of a plain text."""

import logging
from typing import Any

from slsam_peft.data.held_out import load_eval_split
from slsam_peft.data.load import load_split
from slsam_peft.data.parts import without_parts
from slsam_peft.data.scoring import Tokens, pair_of, tokenize
from slsam_peft.errors import UserError

logger = logging.getLogger(__name__)


def load_examples(
    tokenizer: Any, name: str, *, held_out: str | None = None, rows: int, max_length: int
) -> list[Tokens]:
    """Load the first rows of a data set.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        name (`str`): File, folder, Hub name or `"stdlib_docs"`, see `slsam_peft.data.load`.
        held_out (`str`, *optional*): A held-out file, or the split of `name` to take instead of `"train"`.
        rows (`int`): How many, at most.
        max_length (`int`): Tokens of a sequence; what is longer is cut.

    Raises:
        UserError: the data cannot be read, are of a kind that has no answer to predict, or no answer is left.
    """
    data = load_split(name) if held_out is None else load_eval_split(name, held_out)
    data = without_parts(data, tokenizer)
    where = name if held_out is None else held_out
    found, number = [], 0
    for number, row in enumerate(data, 1):
        tokens = _tokens(tokenizer, dict(row), f"{where}, row {number}", max_length)
        if max(tokens.prompt, 1) < len(tokens.ids):
            found.append(tokens)
        if len(found) == rows:
            break
    if not found:
        raise UserError(f"{where}: no row has an answer within {max_length} tokens; raise --max_length.")
    if len(found) < number:
        logger.warning(
            "%s: %d of the first %d rows have no answer within %d tokens and are left out; raise --max_length.",
            where,
            number - len(found),
            number,
            max_length,
        )
    return found


def _tokens(tokenizer: Any, row: dict[str, Any], where: str, max_length: int) -> Tokens:
    text = row.get("text")
    if isinstance(text, str):
        return Tokens(tokenizer(text)["input_ids"][:max_length], 0)
    pair = pair_of(row, where)
    if not isinstance(pair[0], str) and not tokenizer.chat_template:
        raise UserError(
            f"{where} is a conversation, and the tokenizer has no chat template; use prompt and completion texts."
        )
    return tokenize(tokenizer, pair, max_length)
