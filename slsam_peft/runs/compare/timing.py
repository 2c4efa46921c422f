"""How long a comparison will take: from runs that are done, or, before there is one, from a few steps of each method.

This module imports no torch.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from slsam_peft.runs.compare.jobs import Job, Plan, Rows

LAST = 4  # runs of a method on a task that count: how busy a machine is changes
PROBED_STEPS = 5  # of which the first is not timed: it sets things up

Work = Counter[tuple[str, str, int]]  # runs, by task, method and steps
Run = Callable[[Mapping[str, Any], Callable[[int, int], None]], dict[str, Any]]


class Sample(NamedTuple):
    """Some steps of a run, and the seconds they took."""

    task: str
    method: str
    steps: float
    seconds: float


def samples_of(plan: Plan, rows: Rows) -> list[Sample]:
    """Return the last runs of each method on each task that say how long they have trained."""
    cells: dict[tuple[str, str], list[Sample]] = {}
    for job, row in plan.done(rows):
        if isinstance(row.get("seconds"), int | float):
            sample = Sample(job.task, job.method, job.settings["steps"], row["seconds"])
            cells.setdefault((job.task, job.method), []).append(sample)
    return [sample for cell in cells.values() for sample in cell[-LAST:]]


def seconds_per_step(plan: Plan, samples: Sequence[Sample], task: str, method: str) -> float | None:
    """Return what a step is expected to take; `None` where nothing says so.

    That of the same method on the same task counts, or else of methods with the same steps there, of the method on
    other tasks, of other methods on the task, of any run; those of other methods in proportion to the expected costs.

    Args:
        plan (`Plan`): The comparison.
        samples (`Sequence[Sample]`): What is known.
        task (`str`): Its name in the comparison.
        method (`str`): The same.
    """

    def cost(of: str) -> float:
        return plan.costs.get(of, 1.0) * plan.batch_share(of)

    for alike in _likest(plan, task, method):
        found = [sample for sample in samples if alike(sample)]
        if found:
            worth = sum(sample.steps * cost(sample.method) for sample in found)
            return cost(method) * sum(sample.seconds for sample in found) / worth
    return None


def same_steps(plan: Plan, method: str, other: str) -> bool:
    """Return whether two methods do the same in a step: they differ in their learning rates and how many there are."""
    one, two = (
        replace(plan.settings.methods[name], learning_rates=(1.0,), steps_share=1.0) for name in (method, other)
    )
    return one == two


def _likest(plan: Plan, task: str, method: str) -> Iterator[Callable[[Sample], bool]]:
    yield lambda sample: (sample.task, sample.method) == (task, method)
    yield lambda sample: sample.task == task and same_steps(plan, method, sample.method)
    yield lambda sample: sample.method == method
    yield lambda sample: sample.task == task
    yield lambda sample: True


def seconds_left(plan: Plan, remaining: Work, samples: Sequence[Sample], beside: float = 0.0) -> float | None:
    """Return what runs are expected to take, one after the other; `None` where nothing says so.

    Args:
        plan (`Plan`): The comparison.
        remaining (`Counter`): How many runs there are of each task, method and number of steps.
        samples (`Sequence[Sample]`): What is known of their steps.
        beside (`float`, *optional*): Seconds that a run takes beside its steps.
    """
    left = 0.0
    for (task, method, steps), count in remaining.items():
        each = seconds_per_step(plan, samples, task, method)
        if each is None:
            return None
        left += count * (each * steps + beside)
    return left


def _completed(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Return samples, and of others those of methods and tasks that have none among the first."""
    known = {(sample.task, sample.method) for sample in samples}
    return [*samples, *(other for other in others if (other.task, other.method) not in known)]


class Pace:
    """What one process knows of how long runs take. Tell it when a run begins, each step, and when it has ended.

    Args:
        plan (`Plan`): The comparison.
        rows (`dict[str, Row]`): Its rows.
        probes (`Sequence[Probe]`, *optional*): What was measured before the first run.
        clock (callable, *optional*): Returns seconds.

    Attributes:
        done (`int`): Runs that have a row.
        total (`int`): All runs.
    """

    def __init__(
        self, plan: Plan, rows: Rows, probes: "Sequence[Probe]" = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._clock = plan, clock
        self._probed = [Sample(p.task, p.method, len(p.steps), sum(p.steps)) for p in probes if p.steps]
        self._beside = [p.beside for p in probes if p.steps]
        self._first_step = clock()
        self._running: Sample | None = None
        self.begin(rows)

    def begin(self, rows: Rows) -> None:
        """Note that a run begins, and which rows there are."""
        self._began, self._running = self._clock(), None
        self.done, self.total = self._plan.counts(rows)
        self._remaining, self._samples = Counter(self._plan.remaining(rows)), samples_of(self._plan, rows)

    def step(self, job: Job, done: int) -> None:
        """Note that a run has made a step; the first one sets things up and is not timed. With no step it begins."""
        now = self._clock()
        if done == 0:
            self._began = now
            return
        if self._running is None:
            self._first_step = now
        self._running = Sample(job.task, job.method, done, now - self._first_step)

    def end(self, row: Mapping[str, Any], rows: Rows) -> None:
        """Note that a run has written its row, and which rows there are now."""
        whole, trained = self._clock() - self._began, row.get("seconds")
        if isinstance(trained, int | float):
            self._beside = [*self._beside[-LAST:], max(0.0, whole - trained)]
        self.begin(rows)

    def left(self) -> float | None:
        """Return the seconds that are left for this process alone; `None` where nothing says so yet."""
        running = self._running
        timed = [running._replace(steps=running.steps - 1)] if running is not None and running.steps > 1 else []
        samples = _completed(_completed(self._samples, timed), self._probed)
        beside = sum(self._beside) / len(self._beside) if self._beside else 0.0
        left = seconds_left(self._plan, self._remaining, samples, beside)
        if left is None or running is None:
            return left
        each = seconds_per_step(self._plan, samples, running.task, running.method) or 0.0
        return max(0.0, left - each * running.steps)


@dataclass(frozen=True)
class Probe:
    """A few steps of a method, timed.

    Args:
        task, method (`str`): Names in the comparison.
        steps (`list[float]`): Seconds of each step but the first one.
        beside (`float`): Seconds beside the steps: loading the model, setting up, scoring the held-out rows.
    """

    task: str
    method: str
    steps: list[float]
    beside: float


def probe(plan: Plan, task: str, method: str, run: Run, clock: Callable[[], float] = time.monotonic) -> Probe:
    """Do a few steps of a run and score it as a run is scored; nothing of it is kept.

    Args:
        plan (`Plan`): The comparison.
        task (`str`): Its name in the comparison.
        method (`str`): The same.
        run (callable): Runs a job's settings, see `slsam_peft.runs.compare.run.run`.
        clock (callable, *optional*): Returns seconds.
    """
    how, seed = plan.settings.methods[method], plan.settings.seeds[0]
    job = plan.job(task, method, plan.settings.match[0], how.candidates[0], seed)
    began, at = clock(), []
    run({**job.settings, "steps": min(PROBED_STEPS, job.settings["steps"])}, lambda *_: at.append(clock()))
    whole = clock() - began
    steps = [after - before for before, after in zip(at, at[1:], strict=False)]
    return Probe(task, method, steps, max(0.0, whole - sum(steps)))


def estimate(plan: Plan, rows: Rows, probes: Sequence[Probe]) -> tuple[float, float] | None:
    """Return the least and the most seconds that a comparison may take; `None` where nothing says so.

    The ends are those of the fastest and of the slowest steps that were timed.

    Args:
        plan (`Plan`): The comparison.
        rows (`dict[str, Row]`): The rows that it has; those of a method come before what was probed of it.
        probes (`Sequence[Probe]`): What was timed.
    """
    ends, remaining = [], Counter(plan.remaining(rows))
    for end in (min, max):
        by_cell: dict[tuple[str, str], list[Sample]] = {}
        for sample in samples_of(plan, rows):
            by_cell.setdefault((sample.task, sample.method), []).append(sample)
        done = [end(cell, key=lambda sample: sample.seconds / sample.steps) for cell in by_cell.values()]
        samples = _completed(done, [Sample(p.task, p.method, 1.0, end(p.steps)) for p in probes if p.steps])
        beside = end((p.beside for p in probes), default=0.0)
        ends.append(seconds_left(plan, remaining, samples, beside))
    low, high = ends
    return None if low is None or high is None else (low, high)
