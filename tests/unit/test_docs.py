"""What the README says is true: its code runs, its commands exist, its defaults are the defaults, no link is dead."""

import ast
import importlib
import importlib.metadata
import re
import runpy
import shlex
import subprocess
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import slsam_peft
from slsam_peft import SLSAMConfig
from slsam_peft.cli.main import SUBCOMMANDS
from slsam_peft.cli.parsing import Parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = ["<pad>", "<eos>", *"what is the capital of france spain peru paris madrid lima".split()]

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="the README's neighbours are not in an sdist")


def blocks(language: str) -> list[tuple[int, str]]:
    """Code blocks of the README, each with the number of its first line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def set_up(marker: str) -> str:
    """The one command in the block that follows `<!-- marker -->`."""
    match = re.search(rf"^<!-- {marker} -->\n```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert match, f"README.md: no bash block after <!-- {marker} -->"
    commands = match[1].strip().splitlines()
    assert len(commands) == 1, f"README.md: one command expected after <!-- {marker} -->"
    return commands[0]


def shown_commands() -> list[list[str]]:
    """Calls of the command line in the README, set-up left out."""
    lines = [line for _, block in blocks("bash") for line in block.splitlines() if line.startswith("slsam-peft ")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def stand_ins() -> dict[str, Any]:
    """What the README's code takes as given: a model of five blocks, its tokenizer, texts, one batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = torch.arange(2, 10).view(2, 4)
    return {
        "model": LlamaForCausalLM(config),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        "dataset": Dataset.from_dict({"text": ["what is the capital of spain", "the capital of peru is lima"] * 8}),
        "batch": {"input_ids": ids, "labels": ids},
    }


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL, by an old name
def test_python_blocks_run_in_order(
    stand_ins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The README's machine has a GPU.
    on_cpu = partial(trl.SFTConfig, use_cpu=True, bf16=False, dataloader_pin_memory=False, disable_tqdm=True)
    monkeypatch.setattr(trl, "SFTConfig", on_cpu)
    found = blocks("python")
    assert found
    namespace = dict(stand_ins)
    for line, block in found:
        exec(compile("\n" * (line - 1) + block, "README.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert trainer.state.global_step > 0
    assert (tmp_path / trainer.args.output_dir / "adapter_model.safetensors").is_file()
    assert int(namespace["slsam"].active.sum()) >= 1


def test_the_switch_is_two_lines() -> None:
    line, block = blocks("python")[0]
    call = next(
        node for node in ast.walk(ast.parse(block)) if getattr(getattr(node, "func", None), "id", "") == "SLSAMTrainer"
    )
    assert isinstance(call, ast.Call)
    assert [k.arg for k in call.keywords if k.arg.startswith("slsam")] == ["slsam_config"], f"README.md, line {line}"


@pytest.mark.parametrize(("marker", "last"), [("quickstart", "slsam-peft quickstart"), ("tests", "pytest")])
def test_two_commands_set_everything_up(marker: str, last: str) -> None:
    steps = [shlex.split(step) for step in set_up(marker).split(" && ")]
    assert steps[0] == ["python3", "-m", "venv", ".venv"]
    assert steps[-1] == shlex.split(f".venv/bin/{last}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for step in steps[1:-1]:
        assert step[:2] == [".venv/bin/pip", "install"]
    extras = re.search(r"\[(.+)\]", steps[-2][-1])
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert "slsam-peft" in project["scripts"]


def test_there_are_two_set_up_commands() -> None:
    installing = [line for _, block in blocks("bash") for line in block.splitlines() if "pip install" in line]
    assert installing == [set_up("quickstart"), set_up("tests")]


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    reading = next(line for line in script.splitlines() if line.startswith("tests="))
    done = subprocess.run(
        ["bash", "-euc", f'{reading}\nprintf "%s" "$tests"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == set_up("tests")
    assert 'bash -c "$tests"\n' in script


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_shown_commands_exist(words: list[str]) -> None:
    name, arguments = words[1], words[2:]
    assert name in SUBCOMMANDS
    for word in arguments:
        assert not word.startswith("recipes/") or (ROOT / word).is_file(), f"README.md names {word}"
    command: ModuleType = importlib.import_module(f"slsam_peft.cli.{name}")
    if getattr(command, "RAW_ARGV", False):
        from slsam_peft.cli.arguments import parse

        config = str(ROOT / arguments[arguments.index("--config") + 1])
        parse(["--config", config, *arguments[2:], "--use_cpu", "--bf16", "false"])
    else:
        parser = Parser(name, command.HELP)
        command.add_arguments(parser)
        parser.read(arguments)


def test_public_names_are_documented() -> None:
    assert not [name for name in slsam_peft.__all__ if f"{name}" not in README]


def test_settings_table_states_the_defaults() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \|", README.partition("## Settings")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert len(rows) > 5
    config = SLSAMConfig()
    for name, shown in rows:
        assert name in {f.name for f in fields(SLSAMConfig)}
        value = config.fraction if name == "active_fraction" else getattr(config, name)
        read = None if shown.strip() == "none" else ast.literal_eval(shown.strip().strip("`"))
        assert read == value, f"README.md: default of {name}"


def test_metrics_exist() -> None:
    telemetry = ast.parse((ROOT / "slsam_peft" / "algorithm" / "telemetry.py").read_text())
    logged = {node.value for node in ast.walk(telemetry) if isinstance(node, ast.Constant)}
    shown = set(re.findall(r"`slsam/(\w+)`", README))
    assert len(shown) > 5
    assert shown <= logged


def test_supported_table_names_tests_that_exist() -> None:
    named = re.findall(r"\[`(test_\w+)`\]\((tests/[\w/]+\.py)\)", README)
    assert len(named) > 10
    for test, path in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"README.md names {test}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    anchors = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    local = [target for target in targets if not target.startswith("https://")]
    assert not [t for t in local if not (t[1:] in anchors if t.startswith("#") else (ROOT / t).exists())]
    core = {
        f"slsam_peft/algorithm/{name}.py"
        for name in ("bandit", "sampling", "perturbation", "arms", "horizon", "slsam")
    }
    assert core <= set(targets)


@pytest.mark.parametrize("name", ["draw_method.py", "draw_bandit.py"])
def test_the_picture_is_what_its_script_draws(name: str, tmp_path: Path) -> None:
    command = (ROOT / "recipes" / name).read_text().splitlines()[0].removeprefix("# ")
    _, script, stored = shlex.split(command)
    drawn = tmp_path / "drawn.svg"
    runpy.run_path(str(ROOT / script))["main"]([str(drawn)])
    kept = (ROOT / stored).read_text()
    if f"Matplotlib v{importlib.metadata.version('matplotlib')}," in kept:  # others may place a path differently
        assert drawn.read_text() == kept
    assert f"]({stored})" in README


def test_the_paper_is_credited() -> None:
    assert "https://arxiv.org/abs/2602.09395" in README
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_changelog_has_the_present_version_or_is_unreleased() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", slsam_peft.__version__)
