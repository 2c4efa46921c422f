"""A comparison on one's own data goes on as it was begun, and what a command asks for otherwise is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from slsam_peft.cli.compare_begun import begun_in
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.begun import otherwise
from slsam_peft.runs.compare.jobs import Plan
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.settings import CompareSettings
from slsam_peft.runs.compare.store import RowStore
from slsam_peft.runs.compare.wishes import Wishes


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Sixteen trainings, as `compare --data` begins them: three epochs of forty rows."""
    task = {"source": "own_data", "file": str(folder / "my.jsonl"), "rows": 40, "validation_rows": 8, "test_rows": 16}
    return {
        "training": {"steps": 30, "batch_size": 4},
        "tasks": {"my": {**task, "digest": "0"}},
        "methods": {
            "plain": {"learning_rates": [1e-4, 3e-4, 9e-4]},
            "auto": {"learning_rates": [3e-4, 9e-4, 2.7e-3], "slsam": {"method": "auto"}},
        },
        "seeds": [0, 1, 2, 3, 4],
        "tuning_seed": 100,
        "match": ["epochs"],
        **changes,
    }


def begun(folder: Path, **changes: Any) -> CompareSettings:
    return parse_settings(values(folder, **changes))


def asked(comparison: CompareSettings, **given: Any) -> dict[str, str]:
    return otherwise(comparison, Wishes(data="my.jsonl", **given), given)


@pytest.mark.parametrize(
    ("wish", "same", "other", "shown"),
    [
        ("runs", [16, 17], [6, 18, 24], "16"),  # the seventeenth is one too few for both methods
        ("epochs", [3.0, 2.95], [1.0, 5.0], "3, 30 steps of 4"),
        ("steps", [30], [29, 45], "30"),
        ("batch_size", [4], [1, 8], "4"),
        ("max_length", [256], [64, 512], "256"),
        ("lora_r", [8], [16], "8"),
        ("learning_rate", [3e-4], [1e-3], "0.0001 and 0.0003 and 0.0009"),
        ("slsam_learning_rate", [9e-4], [6e-4], "0.0003 and 0.0009 and 0.0027"),
        ("dtype", ["float32"], ["bfloat16"], "float32"),
        ("load_in_4bit", [], [True], "without it"),
        ("gradient_checkpointing", [], [True], "without it"),
        ("model", ["smollm2"], ["gemma3"], "smollm2"),
        ("eval_data", [], ["held.jsonl", "test"], "a part of my.jsonl, by a hash"),
    ],
)
def test_each_wish_is_held_against_what_was_begun(
    wish: str, same: list[Any], other: list[Any], shown: str, tmp_path: Path
) -> None:
    comparison = begun(tmp_path)
    for value in same:
        assert asked(comparison, **{wish: value}) == {}
    for value in other:
        assert asked(comparison, **{wish: value}) == {wish: shown}


def test_every_wish_can_be_held_against_what_was_begun(tmp_path: Path) -> None:
    """One that is new is found here: it would be taken for one that is as it was begun."""
    names = [name for name in Wishes.__dataclass_fields__ if name != "data"]
    given: dict[str, Any] = {"eval_data": "held.jsonl", "model": "m", "runs": 6, "steps": 1, "batch_size": 1}
    given |= {"max_length": 1, "lora_r": 1, "learning_rate": 1.0, "slsam_learning_rate": 1.0, "dtype": "bfloat16"}
    wishes = Wishes(data="my.jsonl", **given, load_in_4bit=True, gradient_checkpointing=True)
    assert sorted([*otherwise(begun(tmp_path), wishes, names)]) == sorted(names)


def test_what_nobody_asks_for_is_as_it_was_begun(tmp_path: Path) -> None:
    """Whatever stands for it in a comparison that begins: here nothing is."""
    made = begun(
        tmp_path,
        model="somebody/model",
        training={"steps": 30, "batch_size": 8, "lora_r": 2, "quantize": "nf4", "gradient_checkpointing": True},
    )
    assert asked(made) == {}
    assert asked(made, model="somebody/model", load_in_4bit=True, gradient_checkpointing=True, epochs=6.0) == {}
    assert asked(made, epochs=6.0, batch_size=4) == {"epochs": "6, 30 steps of 8", "batch_size": "8"}


def test_a_held_out_file_may_be_spelled_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    comparison = values(tmp_path)
    comparison["tasks"]["my"]["test_file"] = str(tmp_path / "held.jsonl")
    made = parse_settings(comparison)
    for name in ("held.jsonl", "./held.jsonl", str(tmp_path / "held.jsonl")):
        assert asked(made, eval_data=name) == {}
    assert asked(made, eval_data="other.jsonl") == {"eval_data": str(tmp_path / "held.jsonl")}
    comparison["tasks"]["my"]["test_file"] = "test"
    assert asked(parse_settings(comparison), eval_data="test") == {}


# In the folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a comparison is begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "compare-my").mkdir()
    save(values(tmp_path))
    return tmp_path


def save(comparison: dict[str, Any]) -> None:
    Path("compare-my/compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))


def store() -> RowStore:
    return RowStore(Path("compare-my/rows/compare.jsonl"))


def done(folder: Path, count: int) -> None:
    for job in [*Plan(begun(folder), {}).pending({})][:count]:
        store().append({"key": job.key, "error": "NaN"})


def look(**given: Any) -> CompareSettings | None:
    return begun_in(Path("compare-my/compare.yaml"), Wishes(data="my.jsonl", **given), given, store())


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_goes_on_and_so_does_one_without_flags(here: Path) -> None:
    done(here, 2)
    for given in ({}, {"runs": 16}, {"epochs": 3.0, "batch_size": 4}):
        assert look(**given) == begun(here)


def test_other_flags_are_refused_by_name_and_change_nothing(here: Path) -> None:
    done(here, 2)
    before = contents(here)
    with pytest.raises(UserError) as caught:
        look(epochs=5.0, load_in_4bit=True, runs=16)
    assert str(caught.value).splitlines() == [
        "compare-my/compare.yaml was begun otherwise, and 2 of its 16 runs are done. Nothing has been changed.",
        "  --epochs 5, begun: 3, 30 steps of 4",
        "  --load_in_4bit, begun: without it",
        "Leave out --epochs, --load_in_4bit to go on with it, or name another folder to begin another one: "
        "--output FOLDER.",
    ]
    # Runs are taken over where those of the other comparison are as long and on the same rows.
    with pytest.raises(UserError, match=r"--output FOLDER \(with --results compare-my/rows/compare\.jsonl it takes"):
        look(runs=24)
    assert contents(here) == before


def test_flags_begin_anew_what_no_run_has_been_done_of(here: Path) -> None:
    """As after `--limit 0`, which only says how long it would take; not while a run is in progress."""
    assert look(epochs=5.0) is None
    assert look() == begun(here)
    with store().claim("a job"), pytest.raises(UserError, match="0 of its 16 runs are done"):
        look(epochs=5.0)
    assert look(epochs=5.0) is None
    store().append({"key": "of another comparison", "error": "NaN"})
    assert look(epochs=5.0) is None
    done(here, 1)
    with pytest.raises(UserError, match="1 of its 16 runs are done"):
        look(epochs=5.0)


def test_other_data_and_a_changed_file_are_refused(here: Path) -> None:
    changed = values(here)
    changed["training"]["warmup_steps"] = 3
    save(changed)
    with pytest.raises(UserError, match=r"is not as compare --data writes it\. Go on with it by --config compare-my/"):
        look()
    elsewhere = values(here / "elsewhere")
    save(elsewhere)
    with pytest.raises(UserError, match=r"compare-my holds a comparison on .*/elsewhere/my\.jsonl\. Name another"):
        look()
    Path("compare-my/compare.yaml").unlink()
    assert look() is None
