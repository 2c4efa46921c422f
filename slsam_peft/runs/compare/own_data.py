"""Makes a comparison of plain LoRA, SL-SAM's default and fewer steps out of somebody's own data and a few wishes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from slsam_peft.data.held_out import eval_place
from slsam_peft.data.own_rows import OwnSplit, question_of, split_own
from slsam_peft.data.scoring import tokenize
from slsam_peft.errors import UserError, brief
from slsam_peft.models.load import compute_dtype, find_model, load_config, load_tokenizer
from slsam_peft.models.positions import known_positions
from slsam_peft.runs.compare.grid import EACH, LEAST_OF_THREE, rates_around, spend
from slsam_peft.runs.compare.own_methods import AUTO, PLAIN, Fewer, fewer_steps, settings_of
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.settings import CompareSettings, TrainingSettings
from slsam_peft.runs.compare.tasks import own_split
from slsam_peft.runs.compare.wishes import (
    FEWER_FACTOR,
    LARGER_RANK_FROM,
    LONGEST,
    RATE_FACTOR,
    TUNING_SEED,
    Wishes,
    epochs_of,
    name_of,
    place_of,
    place_of_model,
)

_WHOLE = 1 << 30  # tokens: nothing is cut


class Lengths(NamedTuple):
    """Tokens of a row: of all of it, and of what stands before its answer."""

    whole: int
    before: int


@dataclass(frozen=True)
class OwnComparison:
    """A comparison on one's own data.

    Args:
        values (`dict`): It as plain values, as YAML files of comparisons hold them; empty where there is a file.
        settings (`CompareSettings`): It.
        split (`OwnSplit`): Its rows.
        said (`list[str]`): What there is to say of the rows, as sentences.
    """

    values: dict[str, Any]
    settings: CompareSettings
    split: OwnSplit
    said: list[str]


def own_comparison(wishes: Wishes) -> OwnComparison:
    """Read data and tokenizer and return the comparison; the same wishes and rows give the same one.

    Args:
        wishes (`Wishes`): What was asked for.

    Raises:
        UserError: the rows or the model's tokenizer cannot be read, the rows are too few, see
            `slsam_peft.data.own_rows`, or `max_length` is more than the model has positions.
    """
    split = split_own(wishes.data, wishes.eval_data)
    if wishes.batch_size > len(split.train):
        raise UserError(
            f"batch_size={wishes.batch_size} is more than the {len(split.train)} training rows; use a smaller one."
        )
    most = known_positions(load_config(find_model(wishes.model)))
    if wishes.max_length is not None and most is not None and wishes.max_length > most:
        raise UserError(
            f"max_length={wishes.max_length} is more than the {most} positions of {wishes.model} "
            f"(max_position_embeddings); use --max_length {most}, or less."
        )
    lengths = _lengths(wishes.model, split)
    training = _training(wishes, len(split.train), wishes.max_length or _max_length(lengths, most or LONGEST))
    fewer = fewer_steps(training["steps"], training["batch_size"], len(split.train))
    left_out = []
    if fewer is not None and wishes.runs is not None and wishes.runs < LEAST_OF_THREE:
        why = f"to choose its learning rate as well takes --runs {LEAST_OF_THREE} or more."
        fewer, left_out = None, [f"Plain LoRA with {fewer.short} is not tried: {why}"]
    values = _values(wishes, split, training, fewer)
    settings = parse_settings(values)
    return OwnComparison(values, settings, split, [*_said(wishes, split, lengths, settings.training), *left_out])


def own_begun(wishes: Wishes, begun: CompareSettings) -> OwnComparison:
    """Read data and tokenizer of a comparison that was begun before, and return it as it was begun.

    Args:
        wishes (`Wishes`): What is asked for now; nothing of it is otherwise, see `slsam_peft.runs.compare.begun`.
        begun (`CompareSettings`): The comparison.

    Raises:
        UserError: the rows cannot be read, or are not those that it was begun with.
    """
    [task], training = begun.tasks.values(), begun.training
    split = own_split(task)
    wishes = replace(wishes, eval_data=wishes.eval_data or task.test_file)
    said = _said(wishes, split, _lengths(begun.model, split), training)
    fewer = fewer_steps(training.steps, training.batch_size, len(split.train))
    if fewer is not None and fewer.name not in begun.methods:
        said.append(
            f"This comparison was begun without plain LoRA with {fewer.short}, and goes on so; --runs "
            f"{LEAST_OF_THREE} or more begin one with it in another folder: --output FOLDER."
        )
    return OwnComparison({}, begun, split, said)


def _lengths(model: str, split: OwnSplit) -> list[Lengths]:
    tokenizer = load_tokenizer(find_model(model))
    pairs = (*split.train, *split.validation, *split.test)
    try:
        return [Lengths(len(row.ids), row.prompt) for row in (tokenize(tokenizer, pair, _WHOLE) for pair in pairs)]
    except (ValueError, TypeError, TemplateError) as error:
        raise UserError(
            f"the tokenizer of {model} takes no conversation: {brief(error, 300)}\nName an instruct "
            "or chat model, or give each row a text as its prompt and its completion."
        ) from error


def _max_length(lengths: Sequence[Lengths], most: int) -> int:
    """Return the longest row's tokens, rounded up to a multiple of 8."""
    return min(LONGEST, most, -(-max(row.whole for row in lengths) // 8) * 8)


def _training(wishes: Wishes, rows: int, max_length: int) -> dict[str, Any]:
    return {
        "steps": wishes.steps or math.ceil((wishes.epochs or epochs_of(rows)) * rows / wishes.batch_size),
        "batch_size": wishes.batch_size,
        "max_length": max_length,
        "lora_r": wishes.lora_r or (16 if rows >= LARGER_RANK_FROM else 8),
        "dtype": wishes.dtype or _dtype(),
        "quantize": "nf4" if wishes.load_in_4bit else "none",
        "gradient_checkpointing": wishes.gradient_checkpointing,
    }


def _values(wishes: Wishes, split: OwnSplit, training: Mapping[str, Any], fewer: Fewer | None) -> dict[str, Any]:
    task = {"source": "own_data", "file": place_of(wishes.data)}
    if wishes.eval_data is not None:
        own = eval_place(wishes.data, wishes.eval_data)
        task["test_file"] = wishes.eval_data if own is None else str(Path(own).expanduser().absolute())
    counts = {"rows": len(split.train), "validation_rows": len(split.validation), "test_rows": len(split.test)}
    middles = {PLAIN: wishes.learning_rate, AUTO: wishes.slsam_learning_rate or RATE_FACTOR * wishes.learning_rate}
    if fewer is not None:
        middles[fewer.name] = FEWER_FACTOR * wishes.learning_rate
    rates, seeds = spend(wishes.runs or EACH * len(middles), len(middles))
    return {
        "model": place_of_model(wishes.model),
        "training": dict(training),
        "tasks": {name_of(wishes.data): {**task, **counts, "digest": split.digest}},
        "methods": {
            name: {"learning_rates": rates_around(middle, rates), **settings_of(name)}
            for name, middle in middles.items()
        },
        "seeds": list(range(seeds)),
        "tuning_seed": TUNING_SEED,
        "match": ["epochs"],
    }


def _dtype() -> str:
    gpu = torch.cuda.is_available()
    return str(compute_dtype("auto")).removeprefix("torch.") if gpu else "float32"


def _said(wishes: Wishes, split: OwnSplit, lengths: Sequence[Lengths], training: TrainingSettings) -> list[str]:
    said, limit, pairs = [], training.max_length, [*split.train, *split.validation, *split.test]
    if split.shared:
        said.append(
            f"{split.shared} rows of {wishes.eval_data} are not scored: their questions are in {wishes.data} too."
        )
    repeated = len(pairs) - len({(question_of(pair), pair[1]) for pair in pairs})
    if repeated:
        said.append(
            f"{repeated} of {len(pairs)} rows say what another one says, and count as often as they are there; those "
            "that are alike are in the same part."
        )
    cut = sum(row.whole > limit for row in lengths)
    lost = sum(row.before >= limit for row in lengths)
    if cut:
        longest = max(row.whole for row in lengths)
        said.append(
            f"{cut} of {len(lengths)} rows are cut at {limit} tokens, {lost} of them before their answer begins; the "
            f"longest has {longest} (--max_length)."
        )
    if (training.steps - 1) * training.batch_size < len(split.train):
        said.append(
            "Each row is seen once at most; in our measurements SL-SAM was ahead only where few rows were repeated."
        )
    return said
