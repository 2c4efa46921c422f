"""`slsam-peft sft`: help without torch, and a short message for everything that cannot be done."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from slsam_peft import SLSAMConfig
from slsam_peft.cli.arguments import build_parser, parse, read_config, slsam_arguments
from slsam_peft.cli.main import main
from slsam_peft.cli.sft import run_raw
from slsam_peft.errors import UserError
from slsam_peft.models.fetched import FETCHED
from slsam_peft.runs import finetune

HELP_SECONDS = 2.0
RECIPES = Path(__file__).resolve().parents[2] / "recipes"

# TRL sets fields of transformers by their old names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data and a model that has a configuration but no weights.

    An error about anything but the weights thus shows that it came before the model was loaded.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    Path("bare").mkdir()
    Path("bare/config.json").write_text('{"model_type": "llama"}')
    Path("train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return tmp_path


GOOD = ["--model_name_or_path", "model", "--dataset_name", "train.jsonl", "--output_dir", "out", "--use_peft"]
GOOD += ["--use_cpu", "--bf16", "false", "--report_to", "none"]


def test_a_config_that_is_no_text(folder: Path) -> None:
    Path("a.yaml").write_bytes(b"rho: \xff\n")
    with pytest.raises(UserError, match=r"a\.yaml is not UTF-8"):
        read_config("a.yaml")


def test_lines_of_keys(folder: Path) -> None:
    Path("a.yaml").write_text("# comment\nrho: 0.1\n\nbandit: paper\n")
    assert read_config("a.yaml") == ({"rho": 0.1, "bandit": "paper"}, {"rho": 2, "bandit": 4})


def test_flags_win_over_the_file_and_the_file_over_defaults(folder: Path) -> None:
    Path("a.yaml").write_text("rho: 0.1\nactive_fraction: 0.5\nlearning_rate: 1e-3\nslsam_seed: 7\nseed: 8\n")
    settings = parse([*GOOD, "--config=a.yaml", "--rho", "0.3", "--max-steps", "4"])
    assert settings.slsam == SLSAMConfig(rho=0.3, active_fraction=0.5, seed=7)
    assert (settings.training.learning_rate, settings.training.seed, settings.training.max_steps) == (1e-3, 8, 4)


EVERY_SETTING = [
    SLSAMConfig(
        method="depth", rho=0.2, granularity="module", bandit="paper", design="depth", ascent="partial",
        ascent_fraction=0.5, descent="all", cost_budget=1.5, min_probability=0.2, bandit_rate=0.1, radius="length",
        hidden_state_cache_limit_mib=5.0, adapter_dtype="keep", max_skipped_steps=3, accept_state_mismatch=True,
        trace=False, seed=4,
    ),
    SLSAMConfig(loss_rise=0.2, rho_max=1.0, ascent_sequences=2, active_fraction=0.5, ascent="partial"),
]  # fmt: skip


@pytest.mark.parametrize("wanted", EVERY_SETTING, ids=["a budget", "a rise"])
def test_settings_of_slsam_can_be_given(wanted: SLSAMConfig, folder: Path) -> None:
    names = {f.name: "slsam_seed" if f.name == "seed" else f.name for f in fields(SLSAMConfig)}
    given = {n: flag for n, flag in names.items() if getattr(wanted, n) != getattr(SLSAMConfig(), n)}
    flags = [word for name, flag in given.items() for word in (f"--{flag}", str(getattr(wanted, name)))]
    assert parse([*GOOD, *flags]).slsam == wanted


def test_every_setting_of_slsam_is_among_them() -> None:
    default = SLSAMConfig()
    given = {
        f.name for f in fields(SLSAMConfig) for c in EVERY_SETTING if getattr(c, f.name) != getattr(default, f.name)
    }
    assert given == {f.name for f in fields(SLSAMConfig)}


@pytest.mark.parametrize(
    ("content", "flags", "trains_adapters"),
    [
        ("rho: 0.1\n", [], True),
        ("use_peft: true\n", [], True),
        ("use_peft: false\n", [], False),
        ("use_peft: false\n", ["--use_peft"], True),
        ("rho: 0.1\n", ["--use_peft", "false"], False),
    ],
)
def test_adapters_are_trained_unless_told_otherwise(
    content: str, flags: list[str], trains_adapters: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("a.yaml").write_text(content)
    settings = parse([*(word for word in GOOD if word != "--use_peft"), "--config", "a.yaml", *flags])
    assert settings.model.use_peft is trains_adapters
    finetune.check_model(settings.model, settings.training)
    assert ("every weight of the model is trained" in caplog.text) is not trains_adapters


def test_a_model_and_data_are_missed_before_anything_else(folder: Path) -> None:
    Path("a.yaml").write_text("model_name_or_path: model\n")
    for words, said in (
        ([], "there is no model and no data set; add --model_name_or_path NAME --dataset_name NAME, or"),
        (["--rho", "0.1"], "there is no model and no data set"),
        (["--config", "a.yaml"], "there is no data set; add --dataset_name NAME, or"),
        (["--dataset_name", "train.jsonl"], "there is no model; add --model_name_or_path NAME, or"),
        (["--config", "a.yaml", "--model_name_or_path", "", "--dataset_name", "a"], "there is no model; add"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            parse(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_two_flags_are_named_that_make_a_recipe_run() -> None:
    recipe = ["--config", str(RECIPES / "lora_slsam.yaml")]
    with pytest.raises(UserError, match="this machine has none that can do so. Add --use_cpu --bf16 false to run"):
        parse(recipe)
    assert parse([*recipe, "--use_cpu", "--bf16", "false"]).training.use_cpu


def test_environment_variables_of_a_file_are_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLSAM_TEST", "before")
    Path("a.yaml").write_text("env:\n  SLSAM_TEST: after\n")
    parse([*GOOD, "--config", "a.yaml"])
    assert os.environ["SLSAM_TEST"] == "after"


def test_debug_shows_the_error_itself(folder: Path) -> None:
    with pytest.raises(UserError, match=r"rho=-1\.0"):
        main(["sft", *GOOD, "--rho", "-1", "--debug"])


def test_help_lists_every_setting_without_torch() -> None:
    code = (
        "import sys; from slsam_peft.cli.main import main\n"
        "code = main(['sft', '--help'])\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < HELP_SECONDS
    for field in fields(slsam_arguments()):
        assert f"--{field.name} " in done.stdout
        assert field.metadata["help"].split()[0] in done.stdout
    assert "--help-all" in done.stdout
    assert "--seed" not in done.stdout


def test_common_settings_in_the_help_are_real(capsys: pytest.CaptureFixture[str]) -> None:
    run_raw(["--help"])
    text = capsys.readouterr().out
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    own = {"--help", "--help-all", "--config", "--debug"}
    shown = {word.strip(",.:") for word in text.split() if word.startswith("--")} - {"--field", "--name"}
    assert shown - own <= known


def test_help_all_adds_the_settings_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--rho ", "--slsam_seed", "--packing", "--lora_r", "--dataset_name"))


def test_a_dataset_script_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    Path("data/data.py").write_text("raise SystemExit('executed')\n")
    assert main(["sft", *GOOD, "--dataset_name", "data"]) == 2
    assert "executed" not in capsys.readouterr().err


def test_rows_are_checked_before_the_model_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.jsonl").write_text(json.dumps({"text": "a"}) + "\n{\n")
    assert main(["sft", *GOOD]) == 2
    assert "train.jsonl, line 2: not valid JSON" in capsys.readouterr().err


def test_smollm2_needs_no_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FETCHED, "smollm2", lambda status: folder / "model")
    assert main(["sft", *GOOD, "--model_name_or_path", "smollm2"]) == 2
    assert f"{folder / 'model'} cannot be trained" in capsys.readouterr().err  # it has no weights, but was found


@pytest.mark.parametrize("word", [None, "false", "False", "none"])
def test_not_resuming(folder: Path, word: str | None) -> None:
    args = parse(GOOD).training
    args.resume_from_checkpoint = word
    assert finetune.find_checkpoint(args) is None


def test_the_last_checkpoint_is_resumed(folder: Path) -> None:
    """The last intact one: a kill in a save left checkpoint-12."""
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_')):
        (folder / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        save_file({"weight": torch.zeros(1)}, folder / "out" / f"checkpoint-{step}" / "model.safetensors")
    for word in ("true", "auto"):
        args = parse([*GOOD, "--resume_from_checkpoint", word]).training
        assert finetune.find_checkpoint(args) == "out/checkpoint-10"


def test_without_a_checkpoint_auto_starts_afresh(folder: Path) -> None:
    args = parse([*GOOD, "--resume_from_checkpoint", "auto"]).training
    assert finetune.find_checkpoint(args) is None
    (folder / "out" / "checkpoint-2").mkdir(parents=True)  # a kill in the first save
    assert finetune.find_checkpoint(args) is None


class Reader:
    """Stands for a trainer whose reading of a checkpoint ends in an error of whatever kind."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def add_callback(self, callback: object) -> None:
        pass

    def train(self, resume_from_checkpoint: str) -> None:
        raise self.error


@pytest.mark.parametrize("flipped", [True, False])
def test_whatever_a_damaged_file_makes_its_reader_raise_is_refused_by_name(
    flipped: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch does with a changed byte in a pickle; an error of the same kind without damage is a bug."""
    checkpoint = folder / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
    torch.save({"scale": torch.ones(3)}, checkpoint / "scaler.pt")
    content = bytearray((checkpoint / "scaler.pt").read_bytes())
    content[content.index(b"\x80\x02") + 2] ^= 64 * flipped  # the beginning of the pickle
    (checkpoint / "scaler.pt").write_bytes(content)
    assert (finetune.damaged_file(str(checkpoint)) != "") is flipped
    monkeypatch.setattr(finetune, "build_trainer", lambda *_: Reader(LookupError("opcode 24")))
    words = ["sft", *GOOD, "--resume_from_checkpoint", str(checkpoint)]
    if flipped:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "training cannot start: opcode 24" in said
        assert "scaler.pt is damaged; resume from an older checkpoint" in said
    else:
        with pytest.raises(LookupError):
            main(words)


def test_a_held_out_file_that_is_not_used_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = parse([*GOOD, "--dataset_test_split", "train.jsonl"])
    _, held_out = finetune.load_data(settings.script, settings.training)
    assert held_out is None
    assert "train.jsonl is not used: set eval_strategy" in caplog.text
