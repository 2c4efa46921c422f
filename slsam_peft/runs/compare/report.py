"""The report says what the rows say, in one line for each task, match and method."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slsam_peft.runs.compare.jobs import Plan, Rows
from slsam_peft.runs.compare.methods import Candidate
from slsam_peft.runs.compare.metrics import METRICS
from slsam_peft.runs.compare.same_data import check_rows
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.statistics import Difference, holm, paired_difference
from slsam_peft.runs.compare.store import Row


@dataclass(frozen=True)
class Line:
    """A line tells how a method did on a task, on the reported seeds.

    Args:
        task, method, match (`str`): As in the comparison.
        chosen (`Candidate` or `None`): The learning rate, and the radius where several were tried; `None` while open.
        steps (`int` or `None`): Steps of a run; `None` where that is not known.
        scores (`dict[str, dict[int, float]]`): Score by metric and seed.
        cost (`float` or `None`): Mean counted cost of a step, in plain LoRA steps of the common batch size.
        failures (`frozenset[int]`): Seeds whose runs diverged.
        differences (`dict[str, Difference]`): By metric, against the reference; empty for the reference.
        corrected (`dict[str, float]`): Holm-corrected p-values by metric, over all lines of the task and match but
            that of the primary method, which keeps its own.
        before (`dict[str, dict[int, float]]`, *optional*): Score by metric and seed of the adapter that training began
            with; empty where it began with none.
        edge (`str`, *optional*): Whether the chosen learning rate is the `"smallest"` or `"largest"` of three or more.
    """

    task: str
    method: str
    match: str
    chosen: Candidate | None
    steps: int | None
    scores: dict[str, dict[int, float]]
    cost: float | None
    failures: frozenset[int]
    differences: dict[str, Difference]
    corrected: dict[str, float]
    before: dict[str, dict[int, float]] = field(default_factory=dict)
    edge: str | None = None

    @property
    def failed(self) -> int:
        """Runs that diverged."""
        return len(self.failures)

    @property
    def done(self) -> set[int]:
        """Seeds that have been run, diverged ones among them."""
        return {*self.scores["loss"], *self.failures}

    @property
    def total_cost(self) -> float | None:
        """Counted cost of a run, in plain LoRA steps."""
        return None if self.cost is None or self.steps is None else self.cost * self.steps

    def mean(self, metric: str) -> float | None:
        """Return the mean score over the seeds done."""
        values = self.scores[metric].values()
        return sum(values) / len(values) if values else None


def build_report(plan: Plan, rows: Rows) -> list[Line]:
    """Return the lines of a comparison, in its order; what is not done yet leaves gaps.

    Raises:
        UserError: rows are of different data, see `check_rows`.
    """
    check_rows(plan, rows)
    groups: dict[tuple[str, str], list[Line]] = {}
    for task, method, match in plan.cells():
        groups.setdefault((task, match), []).append(_line(plan, rows, task, method, match))
    return [line for group in groups.values() for line in _compared(group, plan.settings)]


def _line(plan: Plan, rows: Rows, task: str, method: str, match: str) -> Line:
    jobs = plan.reported(rows, task, method, match)
    done = [(job.settings["seed"], rows[job.key]) for job in jobs if job.key in rows]
    good = [(seed, row) for seed, row in done if "error" not in row]
    chosen = plan.best(rows, task, method, match)
    return Line(
        task=task,
        method=method,
        match=match,
        chosen=chosen,
        steps=plan.steps(task, method, match),
        scores={metric: {seed: row[metric] for seed, row in good if metric in row} for metric in METRICS},
        cost=plan.batch_share(method) * sum(row["cost"] for _, row in good) / len(good) if good else None,
        failures=frozenset(seed for seed, row in done if "error" in row),
        differences={},
        corrected={},
        before=_by_metric([(seed, row["before"]) for seed, row in good if "before" in row]),
        edge=None if chosen is None else _edge(chosen.rate, plan.settings.methods[method].learning_rates),
    )


def _edge(rate: float, tried: Sequence[float]) -> str | None:
    ends = {max(tried): "largest", min(tried): "smallest"}
    return ends.get(rate) if len(set(tried)) > 2 else None


def _by_metric(scores: Sequence[tuple[int, Row]]) -> dict[str, dict[int, float]]:
    """Return scores by metric and seed, of those metrics that there are."""
    found = {metric: {seed: row[metric] for seed, row in scores if metric in row} for metric in METRICS}
    return {metric: of for metric, of in found.items() if of}


def _compared(lines: Sequence[Line], settings: CompareSettings) -> list[Line]:
    base = next(line for line in lines if line.method == settings.reference)
    compared = []
    for line in lines:
        found = {}
        for metric in METRICS if line is not base else ():
            difference = paired_difference(line.scores[metric], base.scores[metric])
            if difference is not None:
                found[metric] = difference
        compared.append(replace(line, differences=found))
    corrected: list[dict[str, float]] = [{} for _ in compared]
    for metric in METRICS:
        having = [i for i, line in enumerate(compared) if metric in line.differences]
        primary = [i for i in having if compared[i].method == settings.primary]
        for family in (primary, [i for i in having if i not in primary]):
            for i, p in zip(family, holm([compared[i].differences[metric].p for i in family]), strict=True):
                corrected[i][metric] = p
    return [replace(line, corrected=p) for line, p in zip(compared, corrected, strict=True)]
