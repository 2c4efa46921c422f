"""Says in one sentence which method to use on somebody's data, with which settings, and how sure that is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from slsam_peft.runs.compare.jobs import Plan, Rows
from slsam_peft.runs.compare.methods import Candidate, MethodSettings
from slsam_peft.runs.compare.notes import notes_of
from slsam_peft.runs.compare.own_methods import AUTO, FEWER, PLAIN, are_own, settings_of, title
from slsam_peft.runs.compare.report import Line
from slsam_peft.runs.compare.settings import CompareSettings, TaskSettings, TrainingSettings
from slsam_peft.runs.compare.verdict import Verdict, verdict

# What a comparison on somebody's own data sets; `sft_recipe` hands it on.
OWN_TASK = ("source", "file", "test_file", "rows", "validation_rows", "test_rows", "digest")
OWN_TRAINING = (
    *("steps", "batch_size", "max_length", "lora_r", "lora_alpha", "lora_dropout", "lr_scheduler_type"),
    *("weight_decay", "dtype", "quantize", "gradient_checkpointing"),
)


@dataclass(frozen=True)
class Advice:
    """What to do.

    Args:
        method (`str` or `None`): The method to use; `None` where nothing can be said yet, or all have diverged.
        chosen (`Candidate` or `None`): Its settings.
        sentence (`str`): Which to use with which settings, and how sure that is.
        notes (`list[str]`): What else somebody should know, as sentences.
    """

    method: str | None
    chosen: Candidate | None
    sentence: str
    notes: list[str]


def is_own(settings: CompareSettings) -> bool:
    """Return whether a comparison is the one of plain LoRA and the default on somebody's own data, unchanged.

    Plain LoRA with fewer steps may be a third method.
    """
    methods = settings.methods
    if [task.source for task in settings.tasks.values()] != ["own_data"] or not are_own(list(methods)):
        return False
    [(name, task)] = settings.tasks.items()
    return settings == CompareSettings(
        tasks={name: TaskSettings(**{field: getattr(task, field) for field in OWN_TASK})},
        methods={
            method: MethodSettings(learning_rates=how.learning_rates, **settings_of(method))
            for method, how in methods.items()
        },
        training=TrainingSettings(**{field: getattr(settings.training, field) for field in OWN_TRAINING}),
        seeds=settings.seeds,
        tuning_seed=settings.tuning_seed,
        model=settings.model,
        match=("epochs",),
    )


def advise(plan: Plan, rows: Rows, lines: Sequence[Line]) -> Advice:
    """Return what to do.

    Another method than plain LoRA is advised where it is to be preferred to plain LoRA, see `verdict`: its held-out
    loss is lower for sure. Where both others are, SL-SAM has to prove itself in the same way against fewer steps,
    which are cheaper.

    Args:
        plan (`Plan`): A comparison for which `is_own` holds.
        rows (`dict[str, Row]`): Its rows.
        lines (`Sequence[Line]`): What `build_report` makes of them.
    """
    by_method = {line.method: line for line in lines}
    failed = {line.method for line in lines if _has_failed(plan, rows, line)}
    if len(failed) == len(lines):
        which = "Both" if len(lines) == 2 else "All"
        return Advice(None, None, f"{which} methods have diverged in every run; use lower learning rates.", [])
    against = _against_plain(by_method, failed, plan.settings)
    direct = _direct(by_method, failed, plan.settings)
    method, reasons = _preferred(against, direct)
    line, (done, total) = by_method[method], plan.counts(rows)
    if line.chosen is None or not reasons:
        which = "both methods" if len(lines) == 2 else "plain LoRA and another method"
        sentence = f"Nothing can be said yet, after {done} of {total} runs: no seed is done with {which}."
        return Advice(None, None, sentence, [])
    begin = "Use" if done == total else f"So far, after {done} of {total} runs, use"
    rate = f"{'and' if method in FEWER else 'with'} learning rate {line.chosen.shown}"
    sentence = f"{begin} {title(method)} {rate}: {'; and '.join(reasons)}."
    unsaid = direct if method != PLAIN and len(reasons) == 1 else None
    return Advice(method, line.chosen, sentence, notes_of(line, lines, unsaid, plan.settings))


def _against_plain(
    by_method: Mapping[str, Line], failed: Collection[str], settings: CompareSettings
) -> dict[str, Verdict]:
    """Return of each other method whether it or plain LoRA is to be preferred, where that can be said."""
    found = {
        name: verdict(by_method[PLAIN], line, failed, settings)
        for name, line in by_method.items()
        if name != PLAIN and not {PLAIN, name} <= set(failed)
    }
    return {name: of for name, of in found.items() if of is not None}


def _direct(by_method: Mapping[str, Line], failed: Collection[str], settings: CompareSettings) -> Verdict | None:
    """Return whether SL-SAM or fewer steps are to be preferred; `None` where that cannot be said, or both failed."""
    fewer = next((name for name in by_method if name in FEWER), None)
    if fewer is None or {AUTO, fewer} <= set(failed):
        return None
    return verdict(by_method[fewer], by_method[AUTO], failed, settings)


def _preferred(against: Mapping[str, Verdict], direct: Verdict | None) -> tuple[str, list[str]]:
    """Return the method to use and the reasons, none where nothing can be said yet."""
    ahead = [name for name, of in against.items() if of.better == name]
    if not ahead:  # what is known of fewer steps alone is no reason to leave SL-SAM out
        return PLAIN, [of.why for of in against.values()] if AUTO in against else []
    if len(ahead) == 1:
        return ahead[0], [against[ahead[0]].why]
    return (PLAIN, []) if direct is None else (direct.better, [against[direct.better].why, direct.why])


def _has_failed(plan: Plan, rows: Rows, line: Line) -> bool:
    """Return whether all runs that choose a method's learning rate have diverged, or all of the reported seeds."""
    tuning = plan.tuning(line.task, line.method, line.match)
    if tuning and all("error" in rows.get(job.key, {}) for job in tuning):
        return True
    return bool(line.failed) and not line.scores["loss"]
