"""Says which of two methods of a comparison on somebody's data to prefer, and why. Imports no torch."""

import math
from collections.abc import Collection
from typing import NamedTuple

from slsam_peft.runs.compare.own_methods import FEWER, PLAIN, short, that_of, title
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import CONFIDENCE, LEAST_FOR_STATISTICS, Difference, paired_difference


class Verdict(NamedTuple):
    """Which of two methods to prefer.

    Args:
        better (`str`): The method.
        why (`str`): The reason, as a part of a sentence.
        difference (`Difference` or `None`): That of their losses, where it decides.
    """

    better: str
    why: str
    difference: Difference | None = None

    @property
    def is_open(self) -> bool:
        """Whether the losses can tell no difference."""
        return self.difference is not None and self.difference.p >= 1 - CONFIDENCE


def verdict(base: Line, other: Line, failed: Collection[str], settings: CompareSettings) -> Verdict | None:
    """Return which of two methods to prefer; `None` where no seed is done with both.

    The other one is preferred where the paired t-test says that its held-out loss is lower, and the base wherever it
    does not. A method all of whose runs have diverged is not preferred, nor one that diverges on more of the seeds
    that both have been run on; for plain LoRA as the base that counts where more than half of them diverge.

    Args:
        base (`Line`): Of the method that needs no proof: plain LoRA, or the cheaper one of the others.
        other (`Line`): Of the other one.
        failed (`Collection[str]`): Methods all of whose runs have diverged; one of the two at most.
        settings (`CompareSettings`): The comparison.
    """
    if base.method in failed or other.method in failed:
        better, worse = (other, base) if base.method in failed else (base, other)
        return Verdict(better.method, f"{title(worse.method)} has diverged in every run")
    if (worse := _less_stable(base, other)) is not None:
        better = other if worse is base else base
        often = f"{len(worse.failures)} of {count_of(len(worse.done), 'run')}"
        return Verdict(better.method, f"{title(worse.method)} has diverged in {often}")
    difference = paired_difference(other.scores["loss"], base.scores["loss"])
    return None if difference is None else _by_loss(base.method, other.method, difference, settings)


def _less_stable(base: Line, other: Line) -> Line | None:
    """Return the line of the method that is not to be used since it diverges too often, on the seeds of both."""
    both = base.done & other.done
    of_base, of_other = len(base.failures & both), len(other.failures & both)
    if of_other > of_base:
        return other
    lenient = base.method == PLAIN and 2 * of_base <= len(both)
    return base if of_base > of_other and not lenient else None


def _by_loss(base: str, other: str, difference: Difference, settings: CompareSettings) -> Verdict:
    """Return the method to prefer and the reason, from the differences in loss, the other one minus the base."""
    how = how_sure(difference, settings)
    if math.isnan(difference.p) or difference.p >= 1 - CONFIDENCE:
        return Verdict(base, _open(base, other, difference, how, settings), difference)
    better, worse = (base, other) if difference.mean > 0 else (other, base)
    against = "plain" if base == PLAIN else short(base)
    below = f"its held-out loss is {abs(difference.mean):.4f} nats below {that_of(worse)}"
    return Verdict(better, f"{below} ({short(other)} minus {against}: {how})", difference)


def _open(base: str, other: str, difference: Difference, how: str, settings: CompareSettings) -> str:
    """Return the reason to keep to the base where no difference can be told."""
    by = f"{difference.mean:+.4f} nats from {that_of(base)}"
    if other in FEWER:
        return f"{short(other)} is not surely better (its held-out loss is {by}, {how})"
    cheaper = "it is cheaper" if len(settings.methods) == 2 else "it is cheaper than SL-SAM"
    if math.isnan(difference.p):
        return f"{cheaper}, and SL-SAM's loss is {by} ({how})"
    return f"{cheaper}, and there is no difference that these runs can tell (SL-SAM's held-out loss is {by}, {how})"


def how_sure(difference: Difference, settings: CompareSettings) -> str:
    """Return how sure a difference is, as text: interval and p-value, or why there are none, seeds and rows."""
    seeds, rows = len(difference.values), next(iter(settings.tasks.values())).test_rows
    on = f"{count_of(seeds, 'seed')}, {rows} held-out rows"
    if math.isnan(difference.p):
        return f"{on}; " + (
            f"an interval needs {LEAST_FOR_STATISTICS}" if seeds < LEAST_FOR_STATISTICS else "the same on each"
        )
    interval = f"{CONFIDENCE:.0%} t interval {difference.low:+.4f} to {difference.high:+.4f}"
    return f"{interval}, p = {difference.p:.2g}; {on}"


def count_of(number: int, what: str) -> str:
    """Return so many of something as text."""
    return f"{number} {what}" + ("" if number == 1 else "s")
