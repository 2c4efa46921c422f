"""Rows of a comparison that were made of different data are refused, also where the held-out rows alone differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slsam_peft.errors import UserError
from slsam_peft.runs.compare.jobs import Plan
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.report import build_report
from slsam_peft.runs.compare.same_data import check_going_on
from slsam_peft.runs.compare.settings import TaskSettings
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.tasks import load_task
from slsam_peft.runs.compare.worker import next_row

TUNING_SEED = 9


def write(path: Path, start: int, answers: list[str]) -> Path:
    rows = [{"prompt": f"{start + i}?", "completion": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve training rows and ten held-out ones, of which four choose learning rates."""
    return write(tmp_path / "train.jsonl", 0, ["a"] * 12), write(tmp_path / "held.jsonl", 50, ["b"] * 10)


def plan_of(files: tuple[Path, Path]) -> Plan:
    train, held = map(str, files)
    task = {"source": "jsonl", "file": train, "test_file": held, "rows": 8, "validation_rows": 4, "test_rows": 6}
    methods = {"plain": {"learning_rates": [1e-3, 2e-3]}, "auto": {"learning_rates": [1e-3, 2e-3], "slsam": {}}}
    values = {"tasks": {"mine": task}, "methods": methods, "training": {"steps": 3}, "match": ["epochs"]}
    return Plan(parse_settings({**values, "seeds": [0, 1], "tuning_seed": TUNING_SEED}), {})


def do(plan: Plan, store: RowStore, count: int | None = None, without: str = "") -> None:
    """Do runs as they would be done, but for the training."""

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        data = load_task(TaskSettings(**job["task"]), job["seed"])
        row = {"loss": 1.0, "accuracy": 0.5, "exact": 0.5, "cost": 1.0, "seconds": 1.0, "data": data.fingerprint()}
        row["held_out"] = data.held_out_fingerprint()
        row.pop(without, None)
        return row

    while (count is None or count > 0) and next_row(plan, store, lambda *_: None, run) is not None:
        count = None if count is None else count - 1


def going_on(plan: Plan, store: RowStore) -> None:
    check_going_on(plan, store.read(), "mine", load_task(plan.settings.tasks["mine"], TUNING_SEED))


def changed(files: tuple[Path, Path], plan: Plan, which: str) -> None:
    """Change every answer to train on, or that of one row to choose learning rates by or to test on."""
    task = plan.settings.tasks["mine"]
    if which == "train":
        write(files[0], 0, ["changed"] * 12)
        return
    before = load_task(task, 0)
    for row in range(10):
        write(files[1], 50, ["changed" if i == row else "b" for i in range(10)])
        if getattr(load_task(task, 0), which) != getattr(before, which):
            return


@pytest.mark.parametrize("which", ["validation", "test"])
def test_held_out_rows_that_change_are_not_mixed(which: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    """Learning rates were chosen on the rows of before; no two runs of one seed tell of it."""
    plan, store = plan_of(files), RowStore(tmp_path / "rows.jsonl")
    do(plan, store, 4)
    going_on(plan, store)
    changed(files, plan, which)
    with pytest.raises(UserError, match=r"not those of row \w+ \(from before and after one of the files was"):
        going_on(plan, store)
    do(plan, store)
    with pytest.raises(UserError, match=r"\(task mine\) were scored on different held-out rows, from before"):
        build_report(plan, store.read())


def test_training_rows_that_change_are_found_before_anything_is_trained(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, store = plan_of(files), RowStore(tmp_path / "rows.jsonl")
    do(plan, store, 1)
    changed(files, plan, "train")
    with pytest.raises(UserError, match="the data are not those of row"):
        going_on(plan, store)
    do(plan, store)
    with pytest.raises(UserError, match=r"\(task mine, seed 9\) were trained on different data, from before"):
        build_report(plan, store.read())


def test_rows_that_do_not_tell_of_held_out_rows_are_taken_as_they_are(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, store = plan_of(files), RowStore(tmp_path / "rows.jsonl")
    do(plan, store, 4, without="held_out")
    do(plan, store)
    going_on(plan, store)
    assert len(build_report(plan, store.read())) == 2


def test_what_is_held_out_is_the_same_for_every_seed(files: tuple[Path, Path]) -> None:
    sums = TaskSettings(source="reasoning_gym", puzzle="basic_arithmetic", rows=8, test_rows=8, validation_rows=4)
    docs = TaskSettings(source="stdlib_docs", rows=8, test_rows=8, validation_rows=4, label_noise=0.5)
    for task in (plan_of(files).settings.tasks["mine"], sums, docs):
        of_seeds = [load_task(task, seed) for seed in (0, 1)]
        assert len({data.held_out_fingerprint() for data in of_seeds}) == 1
        assert len({data.fingerprint() for data in of_seeds}) == 2
