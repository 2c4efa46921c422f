"""Says in one sentence which of two methods to use on somebody's data, with which settings, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slsam_peft.runs.compare.grid import SPACING
from slsam_peft.runs.compare.jobs import Plan, Rows
from slsam_peft.runs.compare.methods import Candidate, MethodSettings
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings, TaskSettings, TrainingSettings
from slsam_peft.runs.compare.statistics import CONFIDENCE, LEAST_FOR_STATISTICS, Difference

# What a comparison on somebody's own data sets; `sft_recipe` hands it on.
OWN_TASK = ("source", "file", "test_file", "rows", "validation_rows", "test_rows", "digest")
OWN_TRAINING = (
    *("steps", "batch_size", "max_length", "lora_r", "lora_alpha", "lora_dropout", "lr_scheduler_type"),
    *("weight_decay", "dtype", "quantize", "gradient_checkpointing"),
)
SMALL_STEPS = 8  # sequences; in steps of four fewer of them were as good in recipes/compare, in steps of 16 less so

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
    if [task.source for task in settings.tasks.values()] != ["own_data"] or list(settings.methods) != list(NAMES):
        return False
    [(name, task)] = settings.tasks.items()
    rates = {method: how.learning_rates for method, how in settings.methods.items()}
    return settings == CompareSettings(
        tasks={name: TaskSettings(**{field: getattr(task, field) for field in OWN_TASK})},
        methods={
            "plain": MethodSettings(learning_rates=rates["plain"]),
            "auto": MethodSettings(learning_rates=rates["auto"], slsam={"method": "auto"}),
        },
        training=TrainingSettings(**{field: getattr(settings.training, field) for field in OWN_TRAINING}),
        seeds=settings.seeds,
        tuning_seed=settings.tuning_seed,
        model=settings.model,
        match=("epochs",),
    )


def advise(plan: Plan, rows: Rows, lines: Sequence[Line]) -> Advice:
    """Return what to do.

    SL-SAM is advised where the paired t-test says that its held-out loss is lower, and plain LoRA, which is cheaper,
    wherever it does not. A method all of whose runs have diverged is not advised. Nor is SL-SAM where it diverges on
    more of the seeds that both have been run on, and plain LoRA where it does and more than half of them diverge.

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
    elif (worse := _less_stable(plain, auto)) is not None:
        method = "auto" if worse is plain else "plain"
        why = f"{NAMES[worse.method]} has diverged in {len(worse.failures)} of {_count(len(worse.done), 'run')}"
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


def _less_stable(plain: Line, auto: Line) -> Line | None:
    """Return the line of the method that is not to be used since it diverges too often, on the seeds of both."""
    both = plain.done & auto.done
    of_plain, of_auto = len(plain.failures & both), len(auto.failures & both)
    if of_auto > of_plain:
        return auto
    return plain if of_plain > of_auto and 2 * of_plain > len(both) else None


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
    how = f"{CONFIDENCE:.0%} t interval {difference.low:+.4f} to {difference.high:+.4f}, p = {difference.p:.2g}; {on}"
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
    if plain.failures or auto.failures:
        notes.append(
            f"Runs that diverged: {len(plain.failures)} of plain LoRA's {len(plain.done)}, {len(auto.failures)} of "
            f"SL-SAM's {len(auto.done)}; the losses are those of the others."
        )
    notes += [_at_edge(of) for of in (plain, auto) if of.edge is not None]
    if line is auto and settings.training.batch_size <= SMALL_STEPS:
        notes.append(
            "Fewer steps of plain LoRA at a larger rate were not tried; in steps of few sequences they often lower "
            "the loss as much, and cost less."
        )
    notes.append(
        "The interval says how much trainings differ from seed to seed on the same held-out rows; it says nothing of "
        "other rows."
    )
    return notes


def _at_edge(line: Line) -> str:
    assert line.chosen is not None
    flag = "learning_rate" if line.method == "plain" else "slsam_learning_rate"
    further = f"{line.chosen.rate * (SPACING if line.edge == 'largest' else 1 / SPACING):.2g}"
    return (
        f"The learning rate of {NAMES[line.method]} is the {line.edge} of those tried; a further one may be better: "
        f"--{flag} {further}."
    )
