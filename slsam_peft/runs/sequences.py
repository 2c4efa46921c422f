"""Turns rows into sequences as TRL does, and says what it does not: a missing end token, ids that are none."""

import logging
from importlib import import_module
from typing import Any

from trl import SFTTrainer
from trl.data_utils import is_conversational

from slsam_peft.data.parts import without_parts
from slsam_peft.data.tables import is_table
from slsam_peft.errors import UserError
from slsam_peft.models.positions import known_positions, learns_positions
from slsam_peft.trainer.trainer import SLSAMTrainer

_BATCH = 1024
_SCALED = ("linear", "dynamic", "yarn")  # ways of rotary embeddings that reach `factor` times as far

logger = logging.getLogger(__name__)


class CheckedTrainer(SLSAMTrainer):
    """`SLSAMTrainer` that takes contents that are parts of texts, and wants an end token.

    Raises:
        ValueError: a tokenizer without an end token where the rows need one.
        UserError: a row that the model's chat template cannot take.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        check_end_token(dataset, getattr(processing_class, "tokenizer", processing_class), args.dataset_text_field)
        rows = without_parts(dataset, processing_class)
        return super()._prepare_dataset(rows, processing_class, args, packing, formatting_func, dataset_name)


def check_end_token(data: Any, tokenizer: Any, text_field: str) -> None:
    """Check that there is an end token where TRL puts one behind each text.

    Raises:
        ValueError: there is none.
    """
    first = next(iter(data))
    if tokenizer.eos_token is not None or "input_ids" in first or is_conversational(first):
        return
    column = text_field if text_field in first else "completion"
    raise ValueError(
        f"the tokenizer has no end token, and each '{column}' must end with one, or the model never learns to stop; "
        "name the token of its vocabulary that ends a text: --eos_token TOKEN."
    )


def check_token_ids(trainer: SFTTrainer) -> None:
    """Check that the model has an embedding for every token in the rows.

    Raises:
        UserError: it has not; the message names the token.
    """
    model: Any = trainer.model
    layer = model.get_input_embeddings()
    count = getattr(layer, "num_embeddings", None) or layer.weight.shape[0]
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    held_out: Any = trainer.eval_dataset
    sets = [trainer.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])]
    largest = [_largest_id(data) for data in sets if data is not None]
    padding = -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    token = max([*largest, padding])
    if token < count:
        return
    name = tokenizer.convert_ids_to_tokens(token)
    raise UserError(
        f"the rows hold token {token} ({name!r}), and the model has {count} embeddings. Use the tokenizer that the "
        f"model came with, or give the model more, and save it: model.resize_token_embeddings({token + 1})."
    )


def _largest_id(data: Any) -> int:
    """Return the largest token id in a table; -1 for a stream, or one that TRL has not prepared."""
    if not is_table(data) or "input_ids" not in data.column_names:
        return -1
    compute = import_module("pyarrow.compute")  # most of it is made when it is imported
    largest = -1
    for batch in data.select_columns(["input_ids"]).with_format("arrow").iter(_BATCH):
        found = compute.max(compute.list_flatten(batch["input_ids"])).as_py()
        largest = max(largest, -1 if found is None else found)
    return largest


def check_positions(trainer: SFTTrainer) -> None:
    """Check that no row is longer than the model has positions; warn where it can compute with more than it knows.

    Raises:
        UserError: one is, and each position has an embedding of its own; the message names the length that would do.
    """
    model: Any = trainer.model
    known = known_positions(model.config)
    held_out: Any = trainer.eval_dataset
    sets = [trainer.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])]
    longest = max([_longest_row(data) for data in sets if data is not None], default=0)
    if known is None or longest <= known:
        return
    if learns_positions(model):
        raise UserError(
            f"the longest row has {longest} tokens, and the model has embeddings for {known} positions; set "
            f"max_length={known} or less, which cuts longer rows."
        )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    scaled = rope.get("factor") if rope.get("rope_type") in _SCALED else None
    if longest > known * (scaled or 1):
        logger.warning(
            "The longest row has %d tokens, and the model was made for %d: what it computes beyond is not what it "
            "learned. max_length=%d cuts longer rows.",
            longest,
            known,
            known,
        )


def _longest_row(data: Any) -> int:
    """Return the tokens of the longest sequence in a table, counted by documents where rows are packed of them.

    0 for a stream, or a table that TRL has not prepared.
    """
    if not is_table(data) or "input_ids" not in data.column_names:
        return 0
    compute = import_module("pyarrow.compute")
    packed = "seq_lengths" in data.column_names  # each document's positions begin at 0
    column = "seq_lengths" if packed else "input_ids"
    longest = 0
    for batch in data.select_columns([column]).with_format("arrow").iter(_BATCH):
        values = batch[column]
        lengths = compute.list_flatten(values) if packed else compute.list_value_length(values)
        longest = max(longest, compute.max(lengths).as_py() or 0)
    return longest


def check_enough_rows(trainer: SFTTrainer) -> None:
    """Check that an epoch has a batch.

    Raises:
        UserError: it has none, since incomplete ones are dropped.
    """
    args, data = trainer.args, trainer.train_dataset
    if not args.dataloader_drop_last or not is_table(data):
        return
    rows, batch = len(data), args.train_batch_size * args.world_size  # type: ignore[arg-type]
    if rows < batch:
        raise UserError(
            f"dataloader_drop_last drops incomplete batches, and {rows} rows make none of {batch}; set "
            f"per_device_train_batch_size={max(1, rows // args.world_size)}, or leave dataloader_drop_last out."
        )
