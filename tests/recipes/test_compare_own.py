"""`slsam-peft compare --data` on a tiny model: from a file of rows to a file for `sft`, stopped and taken up again."""

import io
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from slsam_peft.cli import compare_own
from slsam_peft.cli.main import main
from slsam_peft.data.load import load_split
from slsam_peft.data.own_rows import read_own
from slsam_peft.errors import UserError
from slsam_peft.runs.compare.own_data import own_comparison
from slsam_peft.runs.compare.reading import read_settings
from slsam_peft.runs.compare.run import training_rows
from slsam_peft.runs.compare.settings import TrainingSettings
from slsam_peft.runs.compare.tasks import TaskData, load_task
from slsam_peft.runs.compare.wishes import Wishes

RUN = "slsam_peft.runs.compare.run.run"


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}"}]}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test, with 48 conversations in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my.jsonl", conversations(48))
    return tmp_path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows" / "compare.jsonl").read_text().splitlines()]


def test_from_rows_to_an_adapter(here: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six trainings of two steps, the advice, and `sft` with the file that came out."""
    small = ["--runs", "6", "--steps", "2", "--batch_size", "2", "--lora_r", "2"]
    assert main(["compare", "--data", "my.jsonl", "--model", str(tiny_model), *small]) == 0
    said = capsys.readouterr().out
    rows = rows_of(here / "compare-my")
    assert len(rows) == 6
    assert {row["settings"]["seed"] for row in rows} == {0, 1, 2}
    assert {row["method"]: row["settings"]["slsam"] for row in rows} == {"plain": None, "auto": {"method": "auto"}}
    assert {row["method"]: row["settings"]["learning_rate"] for row in rows} == {"plain": 3e-4, "auto": 6e-4}
    assert "24 rows of my.jsonl to train on" in said
    assert "(1 of 6 runs done, about" in said
    assert "(6 of 6 runs done)" in said
    assert " for 6 runs, by the fastest and the slowest step timed" in " ".join(said.split())
    # What is advised is in the file, and the file trains.
    recipe = yaml.safe_load((here / "compare-my" / "sft.yaml").read_text())
    advised = {0.0: ("plain LoRA", 3e-4), None: ("SL-SAM (method: auto)", 6e-4)}[recipe.get("rho")]
    assert f"Use {advised[0]} with learning rate {advised[1]:g}: " in said
    assert recipe["learning_rate"] == advised[1]
    assert main(["sft", "--config", "compare-my/sft.yaml", "--max_steps", "2"]) == 0
    adapter = json.loads((here / "compare-my" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 4)
    assert (here / "compare-my" / "adapter" / "adapter_model.safetensors").is_file()


Runner = Callable[[Mapping[str, Any], Callable[[int, int], None]], dict[str, Any]]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Runs are made up: `auto` is ahead on every seed. The list holds the settings of those that were asked for."""
    asked: list[Mapping[str, Any]] = []

    def run(job: Mapping[str, Any], report: Callable[[int, int], None]) -> dict[str, Any]:
        asked.append(job)
        for step in range(job["steps"]):
            report(step + 1, job["steps"])
        data = load_task_data(job)
        loss = 1.0 - (0.1 + 0.01 * job["seed"] if job["slsam"] else 0.0) - job["learning_rate"]
        cost = 1.25 if job["slsam"] else 1.0
        return {"loss": loss, "accuracy": 0.5, "exact": 0.5, "cost": cost, "seconds": 30.0, "data": data}

    monkeypatch.setattr(RUN, run)
    return asked


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def load_task_data(job: Mapping[str, Any]) -> str:
    from slsam_peft.runs.compare.settings import TaskSettings

    return load_task(TaskSettings(**job["task"]), job["seed"]).fingerprint()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_there_is_and_the_same_command_goes_on(
    number: signal.Signals,
    code: int,
    here: Path,
    tiny_model: Path,
    runner: list[Mapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interruptible: None,
) -> None:
    from slsam_peft.runs.compare import run as module

    whole = module.run

    def stopped(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        if len(runner) == 2 + 10:  # two are timed, ten are done
            signal.raise_signal(number)
        return whole(job, report)

    command = ["compare", "--data", "my.jsonl", "--model", str(tiny_model)]
    monkeypatch.setattr(RUN, stopped)
    assert main(command) == code
    out, err = capsys.readouterr()
    assert f"{number.name}: stopped after 10 of 18 runs. The same command goes on from there." in err
    assert "So far, after 10 of 18 runs, use plain LoRA with learning rate 0.00052" in out
    assert len(rows_of(here / "compare-my")) == 10
    assert "# So far, after 10 of 18 runs" in (here / "compare-my" / "sft.yaml").read_text()
    # The rows alone give the same, and what is done is not done again.
    monkeypatch.setattr(RUN, whole)
    runner.clear()
    assert main(["compare", "--data", "my.jsonl", "--report"]) == 0
    assert "So far, after 10 of 18 runs, use plain LoRA" in capsys.readouterr().out
    assert main(["compare", "--data", "my.jsonl", "--list"]) == 0
    assert "10 of 18 runs are done" in capsys.readouterr().out
    assert not runner
    assert main(command) == 0
    assert "8 runs, by the fastest and the slowest run so far" in " ".join(capsys.readouterr().out.split())
    assert len(runner) == 8
    assert len({row["key"] for row in rows_of(here / "compare-my")}) == 18
    text = (here / "compare-my" / "sft.yaml").read_text()
    assert "# Use SL-SAM (method: auto) with learning rate 0.001" in text
    assert yaml.safe_load(text)["method"] == "auto"
    assert main(command) == 0
    assert len(runner) == 8
    assert main(["compare", "--config", "compare-my/compare.yaml"]) == 0
    assert len(runner) == 8


def test_fewer_steps_are_trained_scored_and_handed_on_to_sft(
    here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs that choose learning rates are real; fewer steps are ahead in those made up after them."""
    from slsam_peft.runs.compare import run as module

    whole, steps = module.run, []

    def run(job: Mapping[str, Any], report: Any) -> dict[str, Any]:
        if job["seed"] == 100:
            row = whole(job, report)
            steps.append((job["slsam"] is not None, job["steps"]))
            return row
        loss = 1.0 - (0.1 + 0.01 * job["seed"] if job["steps"] == 3 else 0.0)
        data = load_task_data(job)
        return {"loss": loss, "accuracy": 0.5, "exact": 0.5, "cost": 1.0, "seconds": job["steps"], "data": data}

    monkeypatch.setattr(RUN, run)
    small = ["--runs", "15", "--epochs", "3", "--batch_size", "8", "--lora_r", "2", "--model", str(tiny_model)]
    assert main(["compare", "--data", "my.jsonl", *small]) == 0
    assert steps == [(False, 9), (False, 9), (True, 9), (True, 9), (False, 3), (False, 3)]
    assert len(rows_of(here / "compare-my")) == 15
    out = " ".join(capsys.readouterr().out.split())
    assert "15: 6 to choose learning rates, then 3 seeds of all 3 methods" in out
    assert "Use plain LoRA with a third of the steps and learning rate " in out
    # A report says the same, and what sft makes of the file has as many epochs, of all rows.
    assert main(["compare", "--data", "my.jsonl", "--report"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Use plain LoRA with a third of the steps and learning rate " in out
    assert "slsam-peft sft --config compare-my/sft.yaml" in out
    recipe = yaml.safe_load((here / "compare-my" / "sft.yaml").read_text())
    assert (recipe["num_train_epochs"], recipe["rho"]) == (1, 0.0)
    assert recipe["learning_rate"] in (6.9e-4, 2.1e-3)
    assert main(["sft", "--config", "compare-my/sft.yaml", "--save_strategy", "steps", "--save_steps", "6"]) == 0
    state = json.loads((here / "compare-my" / "adapter" / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["max_steps"], state["epoch"]) == (6, 1.0)


def test_a_comparison_begun_with_two_methods_goes_on_with_them(
    here: Path, tiny_model: Path, runner: list[Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command finds its runs; one with more of them is another comparison, which has the third method."""
    command = ["compare", "--data", "my.jsonl", "--model", str(tiny_model)]
    assert main([*command, "--runs", "12", "--limit", "5"]) == 0
    capsys.readouterr()
    assert main(["compare", "--data", "my.jsonl", "--list"]) == 0
    assert "5 of 12 runs are done" in capsys.readouterr().out
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "begun without plain LoRA with a third of the steps, and goes on so" in out
    assert "Use SL-SAM (method: auto) with learning rate 0.001" in out
    assert "Fewer steps of plain LoRA at a larger rate were not tried" in out
    assert len(rows_of(here / "compare-my")) == 12
    assert main(["compare", "--data", "my.jsonl", "--report"]) == 0
    assert "Use SL-SAM (method: auto) with learning rate 0.001" in capsys.readouterr().out
    elsewhere = ["--output", "more", "--results", "compare-my/rows/compare.jsonl"]
    assert main([*command, "--runs", "18", *elsewhere]) == 0
    assert "18: 6 to choose learning rates, then 4 seeds of all 3 methods" in " ".join(capsys.readouterr().out.split())
    assert len(rows_of(here / "compare-my")) == 18  # those of the two methods count


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_other_flags_than_it_was_begun_with_are_named_and_change_nothing(
    here: Path, tiny_model: Path, runner: list[Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command without flags goes on, whatever stands for them elsewhere; that comes before libraries are loaded."""
    begin = ["compare", "--data", "my.jsonl", "--model", str(tiny_model), "--runs", "6", "--steps", "2"]
    write(here / "held.jsonl", conversations(80)[48:])
    assert main([*begin, "--limit", "3"]) == 0
    before = contents(here)
    runner.clear()
    for flags, begun in (
        (["--runs", "18"], "--runs 18, begun: 6"),
        (["--epochs", "5"], "--epochs 5, begun: 0.333, 2 steps of 4"),
        (["--batch_size", "8"], "--batch_size 8, begun: 4"),
        (["--model", "smollm2"], f"--model smollm2, begun: {tiny_model}"),
        (["--eval_data", "held.jsonl"], "--eval_data held.jsonl, begun: a part of my.jsonl, by a hash"),
    ):
        capsys.readouterr()
        assert main(["compare", "--data", "my.jsonl", *flags]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "compare-my/compare.yaml was begun otherwise, and 3 of its 6 runs are done." in said
        assert f"{begun} Leave out {flags[0]} to go on with it, or name another folder" in said
    assert contents(here) == before
    assert not runner
    assert main(["compare", "--data", "my.jsonl"]) == 0
    assert len(runner) == 3
    rows = rows_of(here / "compare-my")
    assert {(row["settings"]["model"], row["settings"]["updates"]) for row in rows} == {(str(tiny_model), 2)}
    assert len({row["key"] for row in rows}) == 6
    assert contents(here)[str(here / "compare-my" / "compare.yaml")] == before[str(here / "compare-my/compare.yaml")]


def test_what_has_only_been_timed_is_begun_anew_by_other_flags(
    here: Path, tiny_model: Path, runner: list[Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", "my.jsonl", "--model", str(tiny_model), "--limit", "0"]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nothing can be said yet, after 0 of 18 runs: no seed is done with plain LoRA and another method." in out
    assert "held-out loss" not in out  # no table without a number
    assert main([*command, "--runs", "6"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No run had been done of compare-my/compare.yaml, and it is begun anew." in out
    assert "Runs 6: 3 seeds of both methods" in out


def test_a_file_for_sft_that_is_somebodys_own_stays(
    here: Path, tiny_model: Path, runner: list[Mapping[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """And a report says so where the file holds other advice than the rows give now."""
    command, recipe = ["compare", "--data", "my.jsonl", "--model", str(tiny_model)], here / "compare-my" / "sft.yaml"
    assert main(command) == 0
    assert "slsam-peft sft --config" in capsys.readouterr().out
    written = recipe.read_text()
    recipe.write_text(written.replace("# Use SL-SAM", "# So far, use SL-SAM"))
    assert main(["compare", "--data", "my.jsonl", "--report"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sft.yaml says something else; the same command without --report writes it anew." in out
    assert "slsam-peft sft --config" not in out
    recipe.write_text("learning_rate: 1.0\n")
    assert main(command) == 0
    assert "is not one that compare has written, and is left as it is." in " ".join(capsys.readouterr().out.split())
    assert recipe.read_text() == "learning_rate: 1.0\n"
    recipe.unlink()
    assert main(command) == 0
    assert recipe.read_text() == written


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_that_change_are_not_mixed_with_those_before(
    held_out: bool,
    here: Path,
    tiny_model: Path,
    runner: list[Mapping[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Be it those of the file, or held-out ones of one's own, by which learning rates are chosen as well."""
    write(here / "held.jsonl", conversations(80)[48:])
    flags = ["--eval_data", "held.jsonl"] if held_out else []
    command = ["compare", "--data", "my.jsonl", "--model", str(tiny_model), "--runs", "6", *flags]
    assert main([*command, "--limit", "3"]) == 0
    changed = "held.jsonl" if held_out else "my.jsonl"
    whole = (here / changed).read_text()
    write(here / changed, conversations(81)[48:] if held_out else conversations(49))
    before = contents(here)
    capsys.readouterr()
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the rows are not those that this comparison began with. Bring them back, or begin a comparison" in said
    assert main(["compare", "--config", "compare-my/compare.yaml"]) == 2
    assert "the rows are not those that this comparison began with" in " ".join(capsys.readouterr().err.split())
    assert contents(here) == before
    assert main([*command, "--output", "anew"]) == 0
    assert len(rows_of(here / "anew")) == 6
    (here / changed).write_text(whole)
    assert main(command) == 0
    assert len(rows_of(here / "compare-my")) == 6
    write(here / changed, conversations(82)[48:] if held_out else conversations(50))
    assert main(["compare", "--config", "compare-my/compare.yaml", "--limit", "0"]) == 0  # there is nothing to do
    with pytest.raises(UserError, match="the rows are not those that this comparison began with"):
        load_task(read_settings(Path("compare-my/compare.yaml")).tasks["my"], 0)
    (here / "sub").mkdir()
    write(here / "sub" / "my.jsonl", conversations(48))
    assert main(["compare", "--data", "sub/my.jsonl", "--model", str(tiny_model)]) == 2
    assert "Name another folder for this one: --output FOLDER" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report"], "compare-my/compare.yaml does not exist: no comparison on my.jsonl has been begun there"),
        (["--report", "--runs", "8"], "--runs does not go with --report"),
        (["--runs", "5"], "--runs=5 is not allowed; it must be an integer >= 6"),
        (["--epochs", "2", "--steps", "9"], "--epochs=2.0 and steps=9 are both set"),
        (["--output", "my.jsonl"], "--output=my.jsonl is a file; name a folder"),
        (["--output", "gone/folder"], "the folder of gone/folder does not exist"),
        (["--eval_data", "gone.jsonl"], "data file gone.jsonl does not exist"),
        (["--eval_data", "few.jsonl", "--model", "."], "few.jsonl: 9 rows are too few"),
        (["--batch_size", "25"], "batch_size=25 is more than the 24 training rows"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    words: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is looked for: there is none."""

    def fail(*_: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr("slsam_peft.runs.compare.own_data.find_model", fail)
    write(here / "few.jsonl", conversations(57)[48:])
    before = sorted(here.iterdir())
    assert main(["compare", "--data", "my.jsonl", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    "row",
    [
        conversations(8)[7],
        {"prompt": "seven and seven?", "completion": " 14"},
        {"instruction": "seven", "input": "and seven?", "output": "14"},
        {"text": "seven and seven is fourteen"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_rows_are_trained_on_as_sft_trains_on_them(row: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    """The same tokens, and the same ones of them count, as TRL's trainer has them."""
    data = write(tmp_path / "rows.jsonl", [row])
    trl = SFTTrainer(
        str(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64),
        train_dataset=load_split(data),
    )
    expected = trl.data_collator([trl.train_dataset[0]])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    read = read_own(data)
    made = training_rows(
        tokenizer, TaskData(read.pairs, [], [], read.whole), TrainingSettings(steps=1, max_length=64)
    )[0]
    labels = [token if i >= made.prompt else -100 for i, token in enumerate(made.ids)]
    assert made.ids == expected["input_ids"][0].tolist()
    assert labels == expected["labels"][0].tolist()


def test_lengths_give_the_default_and_what_is_cut_is_said(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": f"{i:02}" + "x" * 18, "completion": "y" * 9} for i in range(59)]
    rows.append({"prompt": "z" * 300, "completion": "y" * 9})
    data = write(tmp_path / "rows.jsonl", rows)
    made = own_comparison(Wishes(data=data, model=str(tiny_model)))
    assert made.settings.training.max_length == 256  # the model takes no more
    assert made.said == [
        "1 of 60 rows are cut at 256 tokens, 1 of them before their answer begins; the longest has 310 (--max_length)."
    ]
    data = write(tmp_path / "rows.jsonl", rows[:59])
    made = own_comparison(Wishes(data=data, model=str(tiny_model)))
    assert (made.settings.training.max_length, made.said) == (32, [])
    assert made.settings.training.steps == 8 * 35 / 4
    asked = Wishes(data=data, model=str(tiny_model), max_length=24, epochs=1, load_in_4bit=True, dtype="bfloat16")
    made = own_comparison(asked)
    assert made.said[0].startswith("59 of 59 rows are cut at 24 tokens, 0 of them")
    assert made.said[1].startswith("Each row is seen once at most")
    training = made.settings.training
    assert (training.steps, training.quantize, training.dtype) == (9, "nf4", "bfloat16")


def test_the_screen_fits_into_80_columns(here: Path, tiny_model: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    compare_own.begin(Wishes(data="my.jsonl", model=str(tiny_model)), None, here / "out", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "24 rows of my.jsonl to train on",
        "8 rows to choose learning rates by and 16 to test on, chosen by a hash of the question",
        "48 steps of 4 sequences of at most 32 tokens: 8 epochs, counting every token of a row",
        "learning rate 0.00035 or 0.001",
        "plain, a third learning rate 0.00069 or 0.0021, 16 steps of the steps",  # in two lines, with its label
        "18: 6 to choose learning rates, then 4 seeds of all 3 methods",
    ):
        assert words in " ".join(text.split())
    console = Console(width=80, record=True, file=io.StringIO())
    compare_own.begin(Wishes(data="my.jsonl", model=str(tiny_model), runs=12), None, here / "out", console)
    text = " ".join(console.export_text().split())
    assert "12: 4 to choose learning rates, then 4 seeds of both methods" in text
    assert "Plain LoRA with a third of the steps is not tried" in text
