"""`slsam-peft compare` on a tiny model: every method runs, a second start repeats nothing, the results are written."""

import json
from pathlib import Path

import pytest
import yaml

from slsam_peft.cli.compare import add_arguments, run
from slsam_peft.cli.parsing import Parser
from slsam_peft.errors import UserError
from slsam_peft.integrations.compare.runs import row_order


def comparison(model: Path, data: Path, **changes: object) -> dict:
    """A comparison of four methods on a file."""
    return {
        "model": str(model),
        "training": {"updates": 3, "batch_size": 2, "max_length": 48, "lora_r": 2},
        "tasks": {"sums": {"source": "jsonl", "file": str(data), "rows": 6, "validation_rows": 2, "test_rows": 4}},
        "methods": {
            "plain": {"learning_rates": [1e-2]},
            "sam": {"learning_rates": [1e-2], "slsam": {"rho": 0.05, "active_fraction": 1.0}},
            "depth": {"learning_rates": [1e-2], "slsam": {"rho": 0.05, "design": "depth", "cost_budget": 1.0}},
            "random": {"learning_rates": [1e-2], "random_rho": 0.05},
        },
        "seeds": [0, 1],
        "tuning_seed": 7,
        "match": ["updates", "cost"],
        **changes,
    }


def compare(folder: Path, values: dict, *flags: str) -> int:
    """Write the YAML file and run the subcommand."""
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump(values))
    parser = Parser("compare", "")
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true")
    return run(parser.read(["--config", str(config), *flags]))


def rows_of(folder: Path) -> list[dict]:
    """The rows written so far."""
    return [json.loads(line) for line in (folder / "rows" / "small.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    """A folder in which a comparison has been stopped after three runs and taken up again."""
    folder = tmp_path_factory.mktemp("comparison")
    values = comparison(tiny_model, chats)
    assert compare(folder, values, "--limit", "3") == 0
    assert len(rows_of(folder)) == 3
    assert compare(folder, values, "--table", str(folder / "t.md"), "--plot", str(folder / "p.png")) == 0
    return folder


def test_each_run_has_one_row(done: Path) -> None:
    rows = rows_of(done)
    assert len({row["key"] for row in rows}) == len(rows)
    # Dense SAM costs two updates and is the only method that gets another number of them at equal cost.
    assert sorted(row["method"] for row in rows) == sorted(["plain", "depth", "random"] * 3 + ["sam"] * 6)
    assert {row["settings"]["updates"] for row in rows if row["method"] == "sam"} == {3, 1}


def test_methods_start_from_the_same_adapter_and_batches(done: Path) -> None:
    """With one batch and B = 0, plain LoRA and exact SAM see the same loss first; they differ afterwards."""
    rows = {(row["method"], row["settings"]["updates"], row["settings"]["seed"]): row for row in rows_of(done)}
    plain, sam = rows["plain", 3, 0], rows["sam", 3, 0]
    assert plain["tokens"] == sam["tokens"]
    assert plain["loss"] != sam["loss"]
    assert plain["loss"] == pytest.approx(sam["loss"], rel=0.2)
    assert sam["cost"] == pytest.approx(2.0, rel=0.1)


def test_outputs_are_written(done: Path) -> None:
    text = (done / "t.md").read_text()
    assert text.count("| sam |") == 2
    assert "sums, equal cost" in text
    assert (done / "p.png").read_bytes().startswith(b"\x89PNG")


def test_finished_comparison_trains_nothing(
    done: Path, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a run was repeated")

    monkeypatch.setattr("slsam_peft.integrations.compare.runs.run", fail)
    assert compare(done, comparison(tiny_model, chats)) == 0


def test_existing_outputs_are_kept(done: Path, tiny_model: Path, chats: Path) -> None:
    before = (done / "t.md").read_bytes()
    with pytest.raises(UserError, match="--force"):
        compare(done, comparison(tiny_model, chats), "--table", str(done / "t.md"))
    assert (done / "t.md").read_bytes() == before
    assert compare(done, comparison(tiny_model, chats), "--report", "--force", "--table", str(done / "t.md")) == 0


def test_too_few_rows_are_refused(tmp_path: Path, tiny_model: Path, chats: Path) -> None:
    values = comparison(tiny_model, chats)
    values["tasks"]["sums"]["rows"] = 100
    with pytest.raises(UserError, match="6 training rows, and 100 are asked for"):
        compare(tmp_path, values)


def test_order_of_a_shorter_run_is_a_prefix() -> None:
    assert row_order(5, 7, seed=3) == row_order(5, 23, seed=3)[:7]
    assert sorted(row_order(5, 10, seed=3)) == sorted([*range(5), *range(5)])
    assert row_order(5, 10, seed=3) != row_order(5, 10, seed=4)
