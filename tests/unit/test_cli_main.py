"""The command line's entry point, and what the quickstart refuses before it does anything."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slsam_peft import __version__
from slsam_peft.cli import main as entry
from slsam_peft.cli import quickstart
from slsam_peft.cli.main import SUBCOMMANDS, main
from slsam_peft.cli.parsing import DTYPES, Parser, nearest
from slsam_peft.errors import UserError

HEAVY = "torch transformers trl peft datasets accelerate bitsandbytes".split()
CHECK = """
import sys, time
from slsam_peft.cli.main import main
code = main(sys.argv[1:])
loaded = sorted(set({heavy!r}) & set(sys.modules))
print(code, round(time.process_time(), 3), *loaded, file=sys.stderr)
"""


@pytest.mark.parametrize("words", [[], *([name] for name in SUBCOMMANDS)], ids=lambda words: "-".join(words) or "top")
def test_help_is_instant_and_imports_nothing_heavy(words: list[str]) -> None:
    command = [sys.executable, "-c", CHECK.format(heavy=HEAVY), *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, seconds, *loaded = done.stderr.split()
    assert code == "0"
    assert float(seconds) < 2
    assert loaded == []
    assert "usage: slsam-peft" in done.stdout


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}  " in text for name in SUBCOMMANDS)


def test_subcommands_are_grouped_by_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    order = [text.index(f"\n{title}:\n") for title in entry.GROUPS]
    order += [text.index(f"\n  {name}  ") for names in entry.GROUPS.values() for name in names]
    titles, names = order[: len(entry.GROUPS)], order[len(entry.GROUPS) :]
    assert titles == sorted(titles)
    assert names == sorted(names)
    assert titles[0] < names[0]


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "slsam_peft", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"slsam-peft {__version__}\n"


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name not in ("sft", "compare")])
def test_every_help_shows_defaults_in_the_same_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped inside a default
    parser = Parser(name, "")
    entry._load(name).add_arguments(parser)
    parts = re.split(r"\n  (?=-)", parser.format_help())[1:]
    shown = {part.split()[0]: part for part in parts}
    for action in parser._actions:
        if action.option_strings and action.nargs != 0 and action.default is not None:
            assert shown[action.option_strings[-1]].count("(default: ") == 1


def test_one_thing_has_one_flag_in_every_subcommand() -> None:
    flags: set[str] = set()
    for name in SUBCOMMANDS:
        if name not in ("sft", "compare"):
            parser = Parser(name, "")
            entry._load(name).add_arguments(parser)
            flags |= {flag for action in parser._actions for flag in action.option_strings}
            for action in parser._actions:
                assert action.dest != "dtype" or action.choices == DTYPES
    others = {"--out", "--output_dir", "--adapter", "--held_out", "--dataset", "--seq_len", "--gradient_accumulation"}
    assert not flags & (others | {"--updates", "--model_name_or_path", "--per_device_train_batch_size", "--gpu_gib"})


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("--lr", ["--rho", "--learning_rate"], "--learning_rate"),
        ("--torch-dtype", ["--torch_compile", "--dtype"], "--dtype"),
        ("--lora_rank", ["--local_rank", "--lora_r"], "--lora_r"),
        ("epochs", ["num_train_epochs", "rho"], "num_train_epochs"),
        (
            "--batch_size",
            ["--per_device_train_batch_size", "--per_gpu_train_batch_size"],
            "--per_device_train_batch_size",
        ),
        ("--per_device_train_batch_size", ["--batch_size"], "--batch_size"),
        ("--max_seq_length", ["--max_length", "--max_steps"], "--max_length"),
        ("--model", ["--model_name_or_path", "--model_revision"], "--model_name_or_path"),
        ("--dataset", ["--dataset_name", "--dataset_config"], "--dataset_name"),
        ("--data", ["--dataset_name", "--data_seed"], "--dataset_name"),
        ("--rhoo", ["--rho", "--lora_r"], "--rho"),
    ],
)
def test_other_names_of_a_setting_are_known(typed: str, known: list[str], meant: str) -> None:
    assert nearest(typed, known) == f" Did you mean '{meant}'?"


def test_missing_kernels_stay_off_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """bitsandbytes tells of them when it is imported, on some processors only."""
    assert main(["--version"]) == 0
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert "gemm_4bit" not in "".join(capsys.readouterr())


def test_without_a_subcommand_the_help_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: slsam-peft" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slsam-peft {__version__}\n"


def test_flags_may_be_spelled_with_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(quickstart, "run", lambda args: seen.append((args.epochs, args.output)) or 0)
    assert main(["quickstart", "--epochs=7", "--output", "a-b"]) == 0
    assert seen == [(7, "a-b")]


def test_user_errors_become_a_message_and_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise UserError("no [bold]luck[/bold]\ntry again")

    monkeypatch.setattr(quickstart, "run", fail)
    assert main(["quickstart"]) == 2
    assert capsys.readouterr().err == "slsam-peft: no [bold]luck[/bold]\ntry again\n"
    for words in (["--debug", "quickstart"], ["quickstart", "--debug"]):
        with pytest.raises(UserError):
            main(words)


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        main(["quickstart"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "run", interrupt)
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err == "slsam-peft: interrupted.\n"


def test_raw_arguments_reach_a_subcommand_with_its_own_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(entry._load("sft"), "run_raw", lambda argv: seen.append(argv) or 0)
    assert main(["sft", "--config", "a.yaml", "--learning-rate", "1"]) == 0
    assert seen == [["--config", "a.yaml", "--learning-rate", "1"]]


def test_force_accepts_a_folder_that_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    def stop() -> None:
        raise UserError("checks passed")

    monkeypatch.setattr(quickstart, "silence_libraries", stop)
    with pytest.raises(UserError, match="checks passed"):
        main(["--debug", "quickstart", "--force", "--output", str(tmp_path)])
