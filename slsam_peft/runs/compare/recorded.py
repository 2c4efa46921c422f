"""Rows tell how many steps each method of a comparison got at equal cost, whatever a step is expected to cost now."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slsam_peft.runs.compare.jobs import NAMES_IN_ROWS, Plan, Rows, row_settings
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.store import Row

_STEPS = NAMES_IN_ROWS["steps"]
TOLERANCE = 0.05  # counted and expected cost differ by less: which blocks were drawn, how long the sequences are


class RecordedPlan(Plan):
    """A `Plan` that takes from rows how many steps SL-SAM gets at equal cost.

    That number depends on what a step is expected to cost, which may change from one version to the next while runs of
    it exist. A row belongs to a method if its key is that of one of the method's runs with so many steps; where there
    are several numbers (equal steps, equal cost, another share of the steps), the counted cost in the rows says which
    of them is that of equal cost. Where there is no such row yet, expected costs give the number, and without them it
    is not known.

    Args:
        settings (`CompareSettings`): The comparison.
        rows (`dict[str, Row]`): Its rows, by key.
        costs (`dict[str, float]`, *optional*): Expected costs, as of `Plan`. Reports need none.
    """

    def __init__(self, settings: CompareSettings, rows: Rows, costs: Mapping[str, float] | None = None) -> None:
        plain = {name: 1.0 for name, how in settings.methods.items() if how.slsam is None}
        super().__init__(settings, {**(costs or {}), **plain})
        self._at_equal_cost = self._read(rows, [name for name in settings.methods if name not in plain])

    def steps(self, task: str, method: str, match: str) -> int | None:
        """Return how many steps a method gets; `None` where nothing says so."""
        recorded = self._at_equal_cost.get((task, method)) if match == "cost" else None
        if recorded is not None:
            return recorded
        return None if match == "cost" and method not in self.costs else super().steps(task, method, match)

    def _read(self, rows: Rows, methods: Sequence[str]) -> dict[tuple[str, str], int]:
        # Rows by all that their keys are made of but the number of steps.
        by_settings: dict[str, list[Row]] = {}
        for row in rows.values():
            by_settings.setdefault(_all_but_steps(row.get("settings")), []).append(row)
        found = {}
        for method in methods:
            runs = {task: self._runs(task, method, by_settings) for task in self.settings.tasks}
            # What a step costs is the same on every task, so that all runs of the method tell it together.
            counted = [(row["cost"], steps) for of in runs.values() for row, steps in of if "error" not in row]
            total = sum(steps for _, steps in counted)
            cost = sum(cost * steps for cost, steps in counted) / total if total else None
            for task, of in runs.items():
                steps = self._choose(task, method, {steps for _, steps in of}, cost)
                if steps is not None:
                    found[task, method] = steps
        return found

    def _runs(self, task: str, method: str, by_settings: Mapping[str, list[Row]]) -> list[tuple[Row, int]]:
        """Return the rows of a method's runs on a task, each with its number of steps, whatever that is."""
        found = []
        for tried in self.settings.methods[method].candidates:
            for seed in (*self.settings.seeds, self.settings.tuning_seed):
                job = self.job(task, method, "steps", tried, seed)
                for row in by_settings.get(_all_but_steps(row_settings(job.settings)), ()):
                    steps = row["settings"][_STEPS]
                    if replace(job, settings={**job.settings, "steps": steps}).key == row["key"]:
                        found.append((row, steps))
        return found

    def _choose(self, task: str, method: str, numbers: set[int], cost: float | None) -> int | None:
        """Return which of some numbers of steps is the one at equal cost; `None` where none is."""
        others = numbers - {self.steps(task, method, match) for match in self.settings.match if match != "cost"}
        if cost is None:  # every run has diverged, and such rows have no cost
            return next(iter(others)) if len(others) == 1 else None
        if method in self.costs and super().steps(task, method, "cost") not in numbers:
            numbers = others  # a run at equal steps is none at equal cost, however near it is
        expected = max(1.0, self.plain_steps(task, method) / (cost * self.batch_share(method)))
        nearest = min(numbers, key=lambda steps: abs(steps - expected), default=None)
        near = nearest is not None and abs(nearest - expected) <= 0.5 + TOLERANCE * expected  # 0.5: it was rounded
        return nearest if near else None


def _all_but_steps(settings: Any) -> str:
    """Return what the rows of runs that differ in the number of steps alone have in common."""
    if not isinstance(settings, dict) or not isinstance(settings.get(_STEPS), int):
        return ""
    return json.dumps({name: value for name, value in settings.items() if name != _STEPS}, sort_keys=True)
