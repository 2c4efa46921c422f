"""Says once, when training starts, what a step costs and what our measurements advise for such a run."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slsam_peft.algorithm.slsam import SLSAM

logger = logging.getLogger(__name__)


def advise(trainer: Any, slsam: SLSAM) -> None:
    """Log what a user who changed nothing but the trainer's class should know.

    Args:
        trainer (`Trainer`): Its arguments are read, before the first step.
        slsam (`SLSAM`): The algorithm, as it will run.
    """
    if not slsam.config.is_perturbed or slsam.config.method != "auto":
        return
    args = trainer.args
    each, count = args.per_device_train_batch_size, args.gradient_accumulation_steps
    sequences, wanted = each * count, 0
    for i in range(count):
        wanted += slsam.ascent.take(i, count, each, wanted)
    if not wanted:  # a rule that makes no ascent
        return
    if slsam.runner.pairs:
        where = (
            f"rides along in the previous step's pass, whose memory is that of {sequences + wanted} sequences; "
            "method='auto' with ascent='partial' costs the same and adds no memory to the peak"
        )
    elif slsam.ascent.forwards:
        where = f"runs in {slsam.ascent.forwards} forward passes of its own, which keep nothing for a backward one"
    else:
        where = "runs in a small pass of its own, which adds no memory to the peak"
    logger.info(
        "%d of the %d sequences of a step make its ascent: a step costs about %.2f plain LoRA steps. It %s.",
        *(wanted, sequences, 1 + wanted / sequences * _passes(slsam.ascent.forwards, args), where),
    )
    logger.info(
        "with method='auto' plain LoRA's learning rate, up to twice that, did best in our measurements, and mostly "
        "eight times that where it was as low as 1.25e-4."
    )
    if _epochs(trainer) <= 1:
        logger.warning(
            "this run sees each sequence once, and nothing was gained by sharpness-aware steps there in our "
            "measurements: they help where few rows are repeated. Plain LoRA (rho=0) is cheaper."
        )


def _passes(forwards: int, args: Any) -> float:
    """Return what an ascent costs in plain LoRA steps on the same sequences, to first order.

    Through a frozen base a backward pass costs what a forward one does, and checkpointing runs one more of these.
    """
    return forwards / (3 if args.gradient_checkpointing else 2) if forwards else 1.0


@contextmanager
def unadvised() -> Iterator[None]:
    """Keep the advice back inside the context: of runs whose data set does not say how often a row is seen."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _epochs(trainer: Any) -> float:
    """Return how often each sequence is seen; NaN where the number of sequences is not known."""
    args = trainer.args
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    try:
        rows = len(trainer.train_dataset)
    except TypeError:  # a stream
        return math.nan
    seen = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return seen / rows
