"""These checks try, before the first run of a comparison, what it would otherwise trip over hours later."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import SchedulerType, get_scheduler

from slsam_peft.data.scoring import Pair, answered
from slsam_peft.errors import UserError, brief
from slsam_peft.models.load import find_model, load_tokenizer
from slsam_peft.names import check_name
from slsam_peft.runs.compare.building import arguments_of
from slsam_peft.runs.compare.jobs import Plan, Rows
from slsam_peft.runs.compare.same_data import check_going_on
from slsam_peft.runs.compare.settings import TrainingSettings
from slsam_peft.runs.compare.tasks import TaskData, load_task


def check_plan(plan: Plan, tasks: Sequence[str], rows: Rows) -> None:
    """Load and tokenize tasks once and make the trainer's arguments of every method; nothing is trained or kept.

    Args:
        plan (`Plan`): The comparison.
        tasks (`Sequence[str]`): Names of the tasks that runs are still to be done on, see `Plan.tasks_to_do`.
        rows (`dict[str, Row]`): The rows that it has so far.

    Raises:
        UserError: rows cannot be had, have no answer within `max_length` or are not those of the runs so far, or the
            trainer refuses a setting. The message names the task or the method.
    """
    settings = plan.settings
    tokenizer = load_tokenizer(find_model(settings.model))
    for name in tasks:
        try:
            data = load_task(settings.tasks[name], settings.tuning_seed)
            check_going_on(plan, rows, name, data)
            _check_rows(data, tokenizer, settings.training)
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error
    try:
        names = tuple(kind.value for kind in SchedulerType)
        check_name("training.lr_scheduler_type", settings.training.lr_scheduler_type, names)
    except ValueError as error:
        raise UserError(str(error)) from error
    task = next(iter(settings.tasks))
    for name, method in settings.methods.items():
        try:
            for tried in {candidate.baseline: candidate for candidate in method.candidates}.values():
                job = plan.job(task, name, settings.match[0], tried, settings.tuning_seed)
                _check_arguments(job.settings)
        except (ValueError, TypeError) as error:  # what transformers raises for arguments and schedules
            raise UserError(f"methods.{name} or training: {brief(error)}") from error


def _check_rows(data: TaskData, tokenizer: Any, training: TrainingSettings) -> None:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    if data.backdoor is not None:
        attacked = {f"attacked {name}": data.backdoor.attacks(splits[name]) for name in ("validation", "test")}
        splits |= {"poisoned": data.poison, **attacked}
    for split, pairs in splits.items():
        try:
            rows = answered(tokenizer, pairs, training.max_length, training.prompt_format)
        except (ValueError, TypeError, TemplateError) as error:
            raise UserError(
                f"the model's tokenizer takes no conversation: {brief(error, 300)}\nName an instruct "
                f"or chat model, or {_without_template(pairs, training)}."
            ) from error
        if not rows:
            raise UserError(
                f"no {split} row has an answer within max_length={training.max_length} tokens; raise "
                "training.max_length."
            )


def _without_template(pairs: Sequence[Pair], training: TrainingSettings) -> str:
    """Return what spares the chat template: `prompt_format` stands around a single message alone."""
    several = any(len(prompt) > 1 for prompt, _ in pairs if not isinstance(prompt, str))
    if not several:
        return "set training.prompt_format"
    rows = "give each row a text, or a single message, as its prompt"
    return rows if training.prompt_format is not None else f"{rows} and set training.prompt_format"


def _check_arguments(settings: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="slsam-compare-") as scratch:
        arguments = arguments_of(settings, scratch)
    steps = settings["steps"]
    get_scheduler(  # some schedules need options of their own, which a comparison has no place for
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        arguments.get_warmup_steps(steps),
        steps,
    )
