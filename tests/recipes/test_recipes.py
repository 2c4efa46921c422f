"""Every recipe names its command and its sources and is accepted by the real parser; those for a CPU are run."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slsam_peft import SLSAMConfig
from slsam_peft.cli.arguments import parse
from slsam_peft.cli.main import main
from slsam_peft.cli.quickstart import NUMBERS, RATE_FACTOR

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))  # of sft; each other subcommand has a folder
SCRIPTS = sorted((ROOT / "recipes").rglob("*.py"))

# What a machine without a GPU needs to have the settings of one checked.
ON_CPU = ["--use_cpu", "--bf16", "false"]
TINY = ["--max_steps", "2", "--eval_steps", "1", "--logging_steps", "1", "--dataloader_pin_memory", "false"]

# TRL and transformers call each other by old names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_recipes() -> None:
    stems = {path.stem for path in RECIPES}
    assert {"qlora_slsam_llama3_8b", "qlora_slsam_qwen", "lora_slsam", "plain_lora", "cpu_smollm2"} <= stems
    assert "train_slsam" in {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_first_line_is_the_command_that_runs_it(path: Path) -> None:
    command = path.read_text().splitlines()[0]
    assert command == f"# slsam-peft sft --config {name(path)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_first_line_of_a_script_is_its_command(path: Path) -> None:
    words = shlex.split(path.read_text().splitlines()[0], comments=False)
    assert words[:3] == ["#", "python", name(path)]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_value_has_its_source(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    without = [line for line in lines if not re.search(r"\S\s+# \S", line)]
    assert not without
    assert len(lines) == len(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_are_accepted_as_written(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    settings = parse(["--config", str(path), *ON_CPU])
    of_slsam = {f.name for f in fields(SLSAMConfig)}
    for key, value in written.items():
        if key in ("use_cpu", "bf16", "report_to"):  # set above; "none" becomes an empty list
            continue
        # `seed` is the trainer's here.
        owners = (
            [settings.slsam] if key in of_slsam - {"seed"} else [settings.script, settings.training, settings.model]
        )
        read = [getattr(owner, key) for owner in owners if hasattr(owner, key)]
        assert len(read) == 1, key
        # Enums compare with their value; numbers may be written as texts.
        assert read[0] == type(read[0])(value) if isinstance(read[0], float) else read[0] == value, key


def test_plain_lora_differs_only_in_slsam() -> None:
    with_slsam, plain = (
        yaml.safe_load((ROOT / "recipes" / f"{stem}.yaml").read_text()) for stem in ("lora_slsam", "plain_lora")
    )
    of_slsam = {f.name for f in fields(SLSAMConfig)} - {"seed"}
    apart = of_slsam | {"output_dir", "learning_rate"}
    shared = [{k: v for k, v in r.items() if k not in apart} for r in (with_slsam, plain)]
    assert shared[0] == shared[1]
    assert {name: plain[name] for name in of_slsam & plain.keys()} == {"rho": 0}
    assert 2 <= with_slsam["learning_rate"] / plain["learning_rate"] <= 4


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_set_nothing_of_slsam_that_is_the_default(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    names = {f.name for f in fields(SLSAMConfig)} - {"seed"}
    chosen = {name: written[name] for name in names & written.keys()}
    assert chosen.pop("method", "auto") == "auto"  # named all the same, for whoever reads the file
    defaults = SLSAMConfig().resolved
    assert not [name for name, value in chosen.items() if value == getattr(defaults, name)]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_costs_in_the_recipes_are_those_of_their_steps(path: Path) -> None:
    """ "1 + m/N" is told in a comment, for N sequences on one device."""
    written, text = yaml.safe_load(path.read_text()), path.read_text()
    sequences = written["per_device_train_batch_size"] * written.get("gradient_accumulation_steps", 1)
    told = re.findall(r"costs 1 \+ (\d+)/(\d+) plain LoRA steps", text)
    assert told == ([("1", str(sequences))] if "method" in written else [])
    assert SLSAMConfig().resolved.ascent_sequences == 1


def test_cpu_recipe_has_the_settings_of_the_quickstart() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "cpu_smollm2.yaml").read_text())
    names = {"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}
    defaults = {field: default for field, _, default, _ in NUMBERS}
    # A recipe swaps no answers and evaluates on all held-out pairs.
    for field in defaults.keys() - {"label_noise", "n_train", "n_test", "learning_rate", "slsam_learning_rate"}:
        assert recipe[names.get(field, field)] == defaults[field], field
    assert recipe["dataset_train_split"] == f"train[:{defaults['n_train']}]"
    assert recipe["learning_rate"] == RATE_FACTOR * defaults["learning_rate"]


def test_cpu_recipe_runs_and_plain_peft_loads_its_adapter(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    data = ["--dataset_name", str(chats), "--dataset_train_split", "train[:8]", "--dataset_test_split", "train[8:]"]
    flags = ["--model_name_or_path", str(tiny_model), "--output_dir", str(out), *data, *TINY]
    recipe = str(ROOT / "recipes" / "cpu_smollm2.yaml")
    assert main(["sft", "--config", recipe, *flags, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.err.count("1 of the 4 sequences of a step make its ascent: a step costs about 1.25 plain LoRA") == 1
    )
    assert "plain LoRA's learning rate, up to twice that" in captured.err
    said = captured.out.splitlines()[-1]
    assert f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{tiny_model}"), "{out}")' in said
    log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(any(key in entry for entry in log) for key in ("loss", "eval_loss", "slsam/active_fraction"))

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.arange(2, 12)[None]
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, out)(tokens).logits
    assert adapted.shape == plain.shape
    assert not torch.equal(adapted, plain)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_evaluating_does_not_change_what_is_trained(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    common = ["sft", "--config", str(ROOT / "recipes" / "cpu_smollm2.yaml"), "--model_name_or_path", str(tiny_model)]
    common += ["--dataset_name", str(chats), "--dataset_test_split", "train[:4]", *TINY]
    written = []
    for name, flags in (("silent", ["--eval_strategy", "no"]), ("evaluating", ["--eval_on_start"])):
        assert main([*common, "--output_dir", str(tmp_path / name), *flags]) == 0
        written.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_resuming_goes_on_where_the_run_was_left(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    common = ["sft", "--config", str(ROOT / "recipes" / "lora_slsam.yaml"), *ON_CPU, "--dtype", "float32"]
    common += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(texts), *TINY, "--eval_strategy", "no"]
    common += ["--save_steps", "1", "--lr_scheduler_type", "constant"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*common, "--output_dir", str(whole)]) == 0
    assert main([*common, "--output_dir", str(halves), "--max_steps", "1"]) == 0
    assert main([*common, "--output_dir", str(halves), "--resume_from_checkpoint", "true"]) == 0
    assert (whole / "adapter_model.safetensors").read_bytes() == (halves / "adapter_model.safetensors").read_bytes()
    assert (halves / "checkpoint-2").is_dir()


def test_resuming_with_other_arms_is_refused(
    tiny_model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sft", "--config", str(ROOT / "recipes" / "lora_slsam.yaml"), *ON_CPU, "--dtype", "float32"]
    common += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(texts), *TINY, "--eval_strategy", "no"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*common, "--output_dir", str(first), "--max_steps", "1", "--save_steps", "1"]) == 0
    checkpoint = str(first / "checkpoint-1")
    other = ["--output_dir", str(second), "--resume_from_checkpoint", checkpoint, "--granularity", "module"]
    capsys.readouterr()
    assert main([*common, *other]) == 2
    said = capsys.readouterr().err
    assert "training cannot start" in said
    assert "Traceback" not in said
    assert not second.exists()


def test_settings_that_do_not_fit_the_model_leave_nothing(
    tiny_model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["sft", "--config", str(ROOT / "recipes" / "lora_slsam.yaml"), *ON_CPU, "--dtype", "float32", *TINY]
    flags += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(texts), "--eval_strategy", "no"]
    flags += ["--output_dir", str(tmp_path / "new" / "out")]
    for extra, said in (
        (["--ascent", "ahead", "--use_dora"], "se ascent='auto'"),
        (["--lora_target_modules", "nowhere"], "nowhere"),
        (["--torch_compile"], "torch.compile is not supported"),
        (["--eos_token", "<none>"], "'<none>'"),
        (["--model_init_kwargs", "fast"], "model_init_kwargs='fast'"),
    ):
        assert main([*flags, *extra]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert "Traceback" not in shown
        assert not (tmp_path / "new").exists()


def test_python_script_runs(tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load(ROOT / "recipes" / "train_slsam.py")
    out = tmp_path / "adapter"
    arguments = ["--model", str(tiny_model), "--data", str(chats), "--output_dir", str(out)]
    script.main([*arguments, "--max_steps", "2"])
    said = capsys.readouterr().out
    assert said.count("perturbed with probability") == 5
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_compile(path: Path) -> None:
    compile(path.read_text(), str(path), "exec")
    assert sys.version_info >= (3, 11)
