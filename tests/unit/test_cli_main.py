"""The command line's entry point, and what the quickstart refuses before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from slsam_peft import __version__
from slsam_peft.cli import main as entry
from slsam_peft.cli import quickstart
from slsam_peft.cli.main import SUBCOMMANDS, main
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


def test_without_a_subcommand_the_help_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "subcommands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slsam-peft {__version__}\n"


def test_flags_may_be_spelled_with_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(quickstart, "run", lambda args: seen.append((args.max_steps, args.output_dir)) or 0)
    assert main(["quickstart", "--max-steps=7", "--output-dir", "a-b"]) == 0
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

    monkeypatch.setattr(quickstart, "quieten", stop)
    with pytest.raises(UserError, match="checks passed"):
        main(["--debug", "quickstart", "--force", "--output_dir", str(tmp_path)])
