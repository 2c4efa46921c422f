"""Says in one sentence which of two methods to use on somebody's data, with which settings, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slsam_peft.runs.compare.grid import SPACING
from slsam_peft.runs.compare.jobs import Plan, Rows
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import CONFIDENCE, LEAST_FOR_STATISTICS, Difference, t_interval

NAMES = {"plain": "plain LoRA", "auto": "SL-SAM (method: auto)"}


@dataclass(frozen=True)
class Advice:
    """What to do.

    Args:
        method (`str` or `None`): The method to use; `None` where nothing can be said yet, or both have diverged.
        chosen (`Candidate` or `None`): Its settings.
        sentence (`str`): Which to use with which settings, and how sure that is.
        notes (`list[str]`): What else somebody should know, as sentences.
    """

    method: str | None
    chosen: Candidate | None
    sentence: str
    notes: list[str]


def is_own(settings: CompareSettings) -> bool:
    """Return whether a comparison is the one of plain LoRA and the default on somebody's own data, unchanged."""
    sources = [task.source for task in settings.tasks.values()]
    changed = any(
        how.rhos or how.loss_rises or how.baselines or how.random_rho or how.slsam not in (None, {"method": "auto"})
        for how in settings.methods.values()
    )
    return sources == ["own_data"] and list(settings.methods) == list(NAMES) and not changed


def advise(plan: Plan, rows: Rows, lines: Sequence[Line]) -> Advice:
    """Return what to do.

    SL-SAM is advised where the paired t-test says that its held-out loss is lower, and plain LoRA, which is cheaper,
    wherever it does not. A method that diverges more often than the other is not advised.

    Args:
        plan (`Plan`): A comparison for which `is_own` holds.
        rows (`dict[str, Row]`): Its rows.
        lines (`Sequence[Line]`): What `build_report` makes of them.
    """
    by_method = {line.method: line for line in lines}
    plain, auto = by_method["plain"], by_method["auto"]
    failed = {line.method: _has_failed(plan, rows, line) for line in (plain, auto)}
    if all(failed.values()):
        return Advice(None, None, "Both methods have diverged in every run; use lower learning rates.", [])
    if any(failed.values()):
        method = "auto" if failed["plain"] else "plain"
        why = f"{NAMES['plain' if failed['plain'] else 'auto']} has diverged in every run"
    elif plain.failed != auto.failed:
        worse, method = (plain, "auto") if plain.failed > auto.failed else (auto, "plain")
        why = f"{NAMES[worse.method]} has diverged in {_count(worse.failed, 'run')}"
    elif "loss" in auto.differences:
        method, why = _compared(auto.differences["loss"], plan.settings)
    else:
        method, why = "plain", ""
    line = by_method[method]
    if line.chosen is None or not why:
        return Advice(None, None, "Nothing can be said yet: no seed is done with both methods.", [])
    done, total = plan.counts(rows)
    begin = "Use" if done == total else f"So far, after {done} of {total} runs, use"
    sentence = f"{begin} {NAMES[method]} with learning rate {line.chosen.shown}: {why}."
    return Advice(method, line.chosen, sentence, _notes(line, plain, auto, plan.settings))


def _has_failed(plan: Plan, rows: Rows, line: Line) -> bool:
    """Return whether all runs that choose a method's learning rate have diverged, or all of the reported seeds."""
    tuning = plan.tuning(line.task, line.method, line.match)
    if tuning and all("error" in rows.get(job.key, {}) for job in tuning):
        return True
    return bool(line.failed) and not line.scores["loss"]


def _compared(difference: Difference, settings: CompareSettings) -> tuple[str, str]:
    """Return the method to use and the reason, from the differences in loss, SL-SAM minus plain LoRA."""
    seeds, rows = len(difference.values), next(iter(settings.tasks.values())).test_rows
    on = f"{_count(seeds, 'seed')}, {rows} held-out rows"
    if math.isnan(difference.p):
        how = f"an interval needs {LEAST_FOR_STATISTICS}" if seeds < LEAST_FOR_STATISTICS else "the same on each"
        return (
            "plain",
            f"it is cheaper, and SL-SAM's loss is {difference.mean:+.4f} nats from plain LoRA's ({on}; {how})",
        )
    low, high = t_interval(list(difference.values.values()))
    how = f"{CONFIDENCE:.0%} t interval {low:+.4f} to {high:+.4f}, p = {difference.p:.2g}; {on}"
    if difference.p >= 1 - CONFIDENCE:
        return "plain", (
            "it is cheaper, and there is no difference that these runs can tell (SL-SAM's held-out loss is "
            f"{difference.mean:+.4f} nats from plain LoRA's, {how})"
        )
    method, other = ("plain", "SL-SAM's") if difference.mean > 0 else ("auto", "plain LoRA's")
    return method, f"its held-out loss is {abs(difference.mean):.4f} nats below {other} (SL-SAM minus plain: {how})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _notes(line: Line, plain: Line, auto: Line, settings: CompareSettings) -> list[str]:
    notes = []
    if auto.cost is not None and plain.cost is not None:
        notes.append(f"A step of SL-SAM costs {auto.cost / plain.cost:.2f} plain ones, by count.")
    rates = settings.methods[line.method].learning_rates
    if len(rates) > 2 and line.chosen is not None and line.chosen.rate in (min(rates), max(rates)):
        which, factor = ("largest", SPACING) if line.chosen.rate == max(rates) else ("smallest", 1 / SPACING)
        flag = "learning_rate" if line.method == "plain" else "slsam_learning_rate"
        further = f"{line.chosen.rate * factor:.2g}"
        notes.append(
            f"Its learning rate is the {which} of those tried; a further one may be better: --{flag} {further}."
        )
    notes.append(
        "The interval says how much trainings differ from seed to seed on the same held-out rows; it says nothing of "
        "other rows."
    )
    return notes
