"""A plan lists the runs of a comparison, in the order in which they are worth most, and says which settings won."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.settings import (
    CompareSettings,
    TaskSettings,
    TrainingSettings,
    plain_value,
    plain_values,
)
from slsam_peft.runs.compare.store import Row

Rows = Mapping[str, Row]

# Part of every key: to be raised when the same settings no longer give the same row.
VERSION = 1

# The names of settings in rows, where they differ from the names of the fields. A key is a hash over the settings of a
# row, names included: with this table rows that exist keep their keys, whatever the fields are called.
NAMES_IN_ROWS = {"steps": "updates", "label_noise": "noisy", "quantize": "quantise"}


# The fields that every row holds. A field that comes later is in a row only where it is not at its default, so that
# rows without it are found as they are.
IN_EVERY_ROW = {
    TaskSettings: (
        *("source", "rows", "test_rows", "validation_rows", "label_noise", "steps", "puzzle", "puzzle_options"),
        *("file", "test_file"),
    ),
    TrainingSettings: (
        *("steps", "batch_size", "max_length", "lr_scheduler_type", "warmup_steps", "weight_decay", "lora_r"),
        *("lora_alpha", "lora_dropout", "gradient_checkpointing", "dtype", "quantize", "prompt_format"),
    ),
}

# The values of later fields that rows without them have, where that is not the default alone.
LEFT_OUT = {"seed_stride": (None, 1)}


def row_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `Job.settings` as rows have them, under their names.

    Args:
        settings (`dict`): `Job.settings`. The options of puzzles and of SL-SAM in it keep their names.
    """
    kinds = {"task": TaskSettings, "training": TrainingSettings}
    parts = {part: _renamed(in_row(settings[part], kind, IN_EVERY_ROW[kind])) for part, kind in kinds.items()}
    return _renamed({**settings, **parts})


def in_row(values: Mapping[str, Any], kind: type, always: Sequence[str]) -> dict[str, Any]:
    """Return the values of a dataclass that a row holds: some always, others where rows without them have other ones.

    Args:
        values (`dict`): As `plain_values` gives them.
        kind (`type`): The dataclass.
        always (`Sequence[str]`): Names of the fields that every row holds.
    """
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(kind)}
    left_out = {name: LEFT_OUT.get(name, (plain_value(default),)) for name, default in defaults.items()}
    return {name: v for name, v in values.items() if name in always or v not in left_out[name]}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {NAMES_IN_ROWS.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Job:
    """A job is one training run and its score.

    Args:
        task, method (`str`): Names in the comparison.
        settings (`dict`): All that decides the result; the key is their hash, see `row_settings`.
    """

    task: str
    method: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of the job on disk; jobs of equal settings share it, whatever they are called."""
        text = json.dumps([VERSION, row_settings(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Plan:
    """A plan knows all jobs of a comparison.

    Args:
        settings (`CompareSettings`): The comparison.
        costs (`dict[str, float]`): Expected cost of a step of each method, in plain LoRA steps of its batch size.
    """

    def __init__(self, settings: CompareSettings, costs: Mapping[str, float]) -> None:
        self.settings = settings
        self.costs = costs

    def batch_share(self, method: str) -> float:
        """Return a method's batch size as a multiple of the common one: what its plain LoRA step costs."""
        return self.settings.batch_size(method) / self.settings.training.batch_size

    def plain_steps(self, task: str, method: str) -> float:
        """Return how many plain LoRA steps of the common batch size a run of a method is worth."""
        wanted = self.settings.tasks[task].steps or self.settings.training.steps
        return wanted * self.settings.methods[method].steps_share

    def steps(self, task: str, method: str, match: str) -> int | None:
        """Return how many steps a method gets; `None` where that is not known, see `RecordedPlan`."""
        each = 1.0 if match == "steps" else self.batch_share(method)  # sequences of a step, of the common ones
        if match == "cost":
            each *= self.costs[method]
        return max(1, round(self.plain_steps(task, method) / each))

    def job(self, task: str, method: str, match: str, tried: Candidate, seed: int) -> Job:
        """Return a run."""
        how = self.settings.methods[method]
        slsam, random_rho = how.slsam_with(tried), how.random_rho
        if slsam is None and tried.rho is not None:
            random_rho = tried.rho
        training, baseline = plain_values(self.settings.training), tried.baseline
        if baseline is not None:
            training |= baseline.of_training
        values = {
            "model": self.settings.model,
            "task": plain_values(self.settings.tasks[task]),
            "training": {**training, "batch_size": self.settings.batch_size(method)},
            "slsam": slsam,
            "random_rho": random_rho,
            "learning_rate": tried.rate,
            "seed": seed,
            "steps": self.steps(task, method, match),
            "split": "validation" if seed == self.settings.tuning_seed else "test",
        }
        if baseline is not None and baseline.beside_training:
            values["baseline"] = baseline.beside_training
        if self.settings.all_scores:
            values["all_scores"] = True
        return Job(task, method, values)

    def tuning(self, task: str, method: str, match: str) -> list[Job]:
        """Return the runs that choose a method's learning rate and radius; none where there is nothing to choose."""
        task, tried = self.settings.tuning_task or task, self.settings.methods[method].candidates
        if len(tried) == 1:
            return []
        return [self.job(task, method, match, candidate, self.settings.tuning_seed) for candidate in tried]

    def best(self, rows: Rows, task: str, method: str, match: str) -> Candidate | None:
        """Return the settings of the lowest validation loss; `None` while one is missing, or where all failed."""
        candidates = self.settings.methods[method].candidates
        if len(candidates) == 1:
            return candidates[0]
        jobs = self.tuning(task, method, match)
        if any(job.key not in rows for job in jobs):
            return None
        losses = [_loss(rows[job.key]) for job in jobs]
        best = min(range(len(jobs)), key=losses.__getitem__)
        return candidates[best] if math.isfinite(losses[best]) else None

    def reported(self, rows: Rows, task: str, method: str, match: str) -> list[Job]:
        """Return the runs of the reported seeds; none while the learning rate is open."""
        best = self.best(rows, task, method, match)
        return [] if best is None else [self.job(task, method, match, best, seed) for seed in self.settings.seeds]

    def pending(self, rows: Rows) -> Iterator[Job]:
        """Yield the jobs that can run and have no row, each once: tuning first, then seed by seed."""
        seen = set(rows)
        for job in self._ordered(rows):
            if job.key not in seen:
                seen.add(job.key)
                yield job

    def counts(self, rows: Rows) -> tuple[int, int]:
        """Return how many runs are done and how many there are; those whose learning rate is open count as well."""
        known = {job.key for job in self._ordered(rows)}
        done = sum(key in rows for key in known)
        return done, len(known) + len(self._open_runs(rows)) * len(self.settings.seeds)

    def remaining(self, rows: Rows) -> list[tuple[str, str, int]]:
        """Return task, method and steps of each run that has no row, those whose learning rate is open among them."""
        pending = [(job.task, job.method, job.settings["steps"]) for job in self.pending(rows)]
        return pending + sorted(self._open_runs(rows), key=str) * len(self.settings.seeds)

    def done(self, rows: Rows) -> list[tuple[Job, Row]]:
        """Return the runs that have a row, each once, in the order in which the rows were written."""
        known = {job.key: job for job in self._ordered(rows)}
        return [(known[key], row) for key, row in rows.items() if key in known]

    def tasks_to_do(self, rows: Rows) -> list[str]:
        """Return the tasks that runs are still to be done on, those whose learning rate is open among them."""
        wanted = {job.task for job in self.pending(rows)} | {task for task, _, _ in self._open(rows)}
        return [task for task in self.settings.tasks if task in wanted]

    def cells(self) -> list[tuple[str, str, str]]:
        """Return every (task, method, match)."""
        s = self.settings
        return [(task, method, match) for task in s.tasks for match in s.match for method in s.methods]

    def _open(self, rows: Rows) -> list[tuple[str, str, str]]:
        """Return the cells whose learning rate cannot be chosen yet."""
        return [cell for cell in self.cells() if any(job.key not in rows for job in self.tuning(*cell))]

    def _open_runs(self, rows: Rows) -> set[tuple[str, str, Any]]:
        """Return task, method and steps of the runs, each of every seed, whose learning rate cannot be chosen yet."""
        return {(task, method, self.steps(task, method, match)) for task, method, match in self._open(rows)}

    def _ordered(self, rows: Rows) -> Iterator[Job]:
        for task in self.settings.tasks:
            cells = [cell for cell in self.cells() if cell[0] == task]
            for cell in cells:
                yield from self.tuning(*cell)
            runs = [self.reported(rows, *cell) for cell in cells]
            for position in range(len(self.settings.seeds)):
                yield from (jobs[position] for jobs in runs if jobs)


def _loss(row: Row) -> float:
    return math.inf if "error" in row else row["loss"]
