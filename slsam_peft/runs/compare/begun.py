"""What was begun on somebody's own data is held against what a later command asks for. Imports no torch."""

import math
from collections.abc import Collection
from pathlib import Path

from slsam_peft.runs.compare.grid import rates_around, spend
from slsam_peft.runs.compare.own_methods import AUTO, PLAIN
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.wishes import Wishes, place_of_model

# Runs of the same length on the same rows: what was done of one comparison is done of the other, too.
SHARING = ("runs", "learning_rate", "slsam_learning_rate")


def otherwise(begun: CompareSettings, wishes: Wishes, given: Collection[str]) -> dict[str, str]:
    """Return which wishes are not what was begun, each with what was begun in its place.

    Wishes that nobody gave are as they were begun, whatever stands for a missing one elsewhere.

    Args:
        begun (`CompareSettings`): A comparison for which `slsam_peft.runs.compare.advice.is_own` holds.
        wishes (`Wishes`): What is asked for.
        given (`Collection[str]`): The names of those that somebody gave.
    """
    held = {**_of_data(begun, wishes), **_of_runs(begun, wishes), **_of_training(begun, wishes, given)}
    return {name: shown for name, (same, shown) in held.items() if name in given and not same}


def _of_data(begun: CompareSettings, wishes: Wishes) -> dict[str, tuple[bool, str]]:
    """Return of the wishes for model and held-out rows whether they are as begun, and what was begun."""
    [task] = begun.tasks.values()
    # A name may be that of a split and of a file that lies here; only reading the data tells, which was done then.
    named = (wishes.eval_data, str(Path(wishes.eval_data or "").expanduser().absolute()))
    return {
        "eval_data": (task.test_file in named, task.test_file or f"a part of {wishes.data}, by a hash"),
        "model": (begun.model == place_of_model(wishes.model), begun.model),
    }


def _of_runs(begun: CompareSettings, wishes: Wishes) -> dict[str, tuple[bool, str]]:
    """Return the same of the wishes for trainings and learning rates."""
    seeds, rates = len(begun.seeds), {name: list(how.learning_rates) for name, how in begun.methods.items()}
    each, methods = len(rates[PLAIN]), len(rates)
    total = methods * (seeds + (each if each > 1 else 0))
    asked = {"learning_rate": (PLAIN, wishes.learning_rate), "slsam_learning_rate": (AUTO, wishes.slsam_learning_rate)}
    return {
        "runs": (wishes.runs is not None and spend(wishes.runs, methods) == (each, seeds), f"{total}"),
        **{
            name: (
                middle is not None and rates_around(middle, each) == rates[method],
                " and ".join(f"{rate:g}" for rate in rates[method]),
            )
            for name, (method, middle) in asked.items()
        },
    }


def _of_training(begun: CompareSettings, wishes: Wishes, given: Collection[str]) -> dict[str, tuple[bool, str]]:
    """Return the same of the wishes for training itself."""
    training, [task] = begun.training, begun.tasks.values()
    size = wishes.batch_size if "batch_size" in given else training.batch_size
    epochs = training.steps * training.batch_size / task.rows
    same = {name: getattr(wishes, name) == getattr(training, name) for name in ("batch_size", "max_length", "lora_r")}
    return {
        **{name: (is_same, f"{getattr(training, name)}") for name, is_same in same.items()},
        "epochs": (
            wishes.epochs is not None and math.ceil(wishes.epochs * task.rows / size) == training.steps,
            f"{epochs:.3g}, {training.steps} steps of {training.batch_size}",
        ),
        "steps": (wishes.steps == training.steps, f"{training.steps}"),
        "dtype": (wishes.dtype == training.dtype, training.dtype),
        "load_in_4bit": (training.quantize == "nf4", "without it"),
        "gradient_checkpointing": (training.gradient_checkpointing, "without it"),
    }
