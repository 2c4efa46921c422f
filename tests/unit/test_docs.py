"""What the pages show works: their code runs, their commands exist, their defaults are the defaults."""

import ast
import importlib
import importlib.metadata
import inspect
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
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slsam_peft import SLSAMConfig
from slsam_peft.cli.main import SUBCOMMANDS
from slsam_peft.cli.parsing import Parser
from slsam_peft.models.shapes import BUILT_IN
from tests.pages import PACKAGE, PAGES, README, ROOT, blocks, in_a_checkout, name_of, prose, section
from tests.tolerances import SIMULATED_PICTURE

WORDS = ["<pad>", "<eos>", *"what is the capital of france spain peru paris madrid lima".split()]
RECIPE = "recipes/small_data_slsam.yaml"

pytestmark = in_a_checkout


def set_up(marker: str) -> str:
    """The one command in the block that follows `<!-- marker -->`."""
    text = README.read_text(encoding="utf-8")
    match = re.search(rf"^<!-- {marker} -->\n```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match, f"README.md: no bash block after <!-- {marker} -->"
    commands = match[1].strip().splitlines()
    assert len(commands) == 1, f"README.md: one command expected after <!-- {marker} -->"
    return commands[0]


def shown_commands() -> list[Any]:
    """Calls of the command line on all pages, set-up left out."""
    lines = [
        (page, line)
        for page in PAGES
        for _, block in blocks(page, "bash")
        for line in block.splitlines()
        if line.startswith("slsam-peft ")
    ]
    words = [(page, shlex.split(line, comments=True)) for page, line in lines]
    return [pytest.param(page, w, id=f"{name_of(page)}: {' '.join(w)}") for page, w in words]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, Any]:
    """What the pages' code takes as given: a model of five blocks with its tokenizer, texts, one batch."""
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
    folder = tmp_path / "model"  # the trainer finds the tokenizer by the model's name
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = torch.arange(2, 10).view(2, 4)
    return {
        "model": LlamaForCausalLM.from_pretrained(folder),
        "dataset": Dataset.from_dict({"text": ["what is the capital of spain", "the capital of peru is lima"] * 8}),
        "batch": {"input_ids": ids, "labels": ids},
    }


def run_blocks(page: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks in order, as somebody who copies them from there and from nowhere else."""
    namespace = dict(given)
    for line, block in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + block, name_of(page), "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL, by an old name
def test_python_blocks_run_in_order(
    stand_ins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A reader has a GPU and trains for three epochs.
    here = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True, "max_steps": 2}
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, **here))
    readme = run_blocks(README, stand_ins)
    trainer = readme["trainer"]
    assert trainer.state.global_step == 2
    assert trainer.slsam_config.method == "auto"
    assert (tmp_path / trainer.args.output_dir / "adapter_model.safetensors").is_file()
    others = {
        name_of(page): run_blocks(page, {**stand_ins, "trainer": trainer})
        for page in PAGES
        if page != README and blocks(page, "python")
    }
    assert int(others["slsam_peft/algorithm/README.md"]["slsam"].active.sum()) >= 1
    assert others["slsam_peft/saving/README.md"]["checkpoint"].endswith("checkpoint-2")


def test_settings_in_the_text_are_allowed() -> None:
    shown = [code for page in PAGES for code in re.findall(r"`(SLSAMConfig\([^`]*\))`", prose(page))]
    assert len(shown) > 3
    for code in shown:
        assert isinstance(eval(code, {"SLSAMConfig": SLSAMConfig}), SLSAMConfig), code


def test_the_switch_is_one_class() -> None:
    call = next(
        node
        for node in ast.walk(ast.parse(blocks(README, "python")[0][1]))
        if getattr(getattr(node, "func", None), "id", "") == "SLSAMTrainer"
    )
    assert isinstance(call, ast.Call)
    own = {keyword.arg for keyword in call.keywords} - set(inspect.signature(trl.SFTTrainer).parameters)
    assert own == set()


def test_the_readmes_settings_are_the_recipes() -> None:
    recipe = yaml.safe_load((ROOT / RECIPE).read_text())
    calls = [node for node in ast.walk(ast.parse(blocks(README, "python")[0][1])) if isinstance(node, ast.Call)]
    shown = {
        keyword.arg: keyword.value.value
        for call in calls
        for keyword in call.keywords
        if isinstance(keyword.value, ast.Constant) and keyword.arg not in ("output_dir", "target_modules")
    }
    assert {"learning_rate", "per_device_train_batch_size"} <= set(shown)
    assert shown == {name: recipe[name] for name in shown}
    assert recipe["method"] == SLSAMConfig().resolved.method


def test_no_leftovers_of_this_test_are_shown() -> None:
    assert not [block for _, block in blocks(README, "python") if re.search("max_steps|use_cpu|disable_tqdm", block)]


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
    lines = [line for page in PAGES for _, block in blocks(page, "bash") for line in block.splitlines()]
    assert [line for line in lines if "pip install" in line] == [set_up("quickstart"), set_up("tests")]


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    reading = next(line for line in script.splitlines() if line.startswith("tests="))
    done = subprocess.run(
        ["bash", "-euc", f'{reading}\nprintf "%s" "$tests"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == set_up("tests")
    assert 'bash -c "$tests"\n' in script


@pytest.mark.parametrize(("page", "words"), shown_commands())
def test_shown_commands_exist(page: Path, words: list[str]) -> None:
    name, arguments = words[1], words[2:]
    assert name in SUBCOMMANDS
    for word in arguments:
        assert not word.startswith("recipes/") or (ROOT / word).is_file(), f"{name_of(page)} names {word}"
    command: ModuleType = importlib.import_module(f"slsam_peft.cli.{name}")
    if getattr(command, "RAW_ARGV", False):
        from slsam_peft.cli.arguments import parse

        config = str(ROOT / arguments[arguments.index("--config") + 1])
        parse(["--config", config, *arguments[2:], "--use_cpu", "--bf16", "false"])
    else:
        parser = Parser(name, command.HELP)
        command.add_arguments(parser)
        parser.read(arguments)


def test_every_command_is_listed() -> None:
    page = PACKAGE / "cli" / "README.md"
    listed = re.findall(r"^\| \w+ \| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(SUBCOMMANDS)


def test_every_built_in_shape_is_listed() -> None:
    shapes = prose(PACKAGE / "models" / "README.md").partition("Built-in shapes are ")[2]
    assert re.findall(r"`([\w.-]+)`", shapes) == list(BUILT_IN)


def test_commands_in_the_text_exist() -> None:
    named = [name for page in PAGES for name in re.findall(r"`slsam-peft (\w+)", prose(page))]
    assert len(named) > 10
    assert set(named) <= {*SUBCOMMANDS, "COMMAND"}


def test_settings_table_states_the_defaults() -> None:
    table = section(PACKAGE / "algorithm" / "README.md", "Settings")
    shown = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    assert set(shown) == {field.name for field in fields(SLSAMConfig)}
    config = SLSAMConfig().resolved
    for name, text in shown.items():
        value = getattr(config, name)
        read = None if text.strip() == "none" else ast.literal_eval(text.strip().strip("`"))
        assert read == value, f"default of {name}"


def test_metrics_exist() -> None:
    telemetry = ast.parse((PACKAGE / "algorithm" / "telemetry.py").read_text())
    strings = {node.value for node in ast.walk(telemetry) if isinstance(node, ast.Constant)}
    table = (PACKAGE / "trainer" / "README.md").read_text().partition("## What is logged\n")[2]
    listed = set(re.findall(r"^\| `slsam/(\w+)` \|", table, re.MULTILINE))
    assert len(listed) > 8
    assert set().union(*(re.findall(r"`slsam/(\w+)`", prose(page)) for page in PAGES)) <= listed <= strings


@pytest.mark.parametrize("name", ["draw_method.py", "draw_bandit.py"])
def test_the_picture_is_what_its_script_draws(name: str, tmp_path: Path) -> None:
    command = (ROOT / "recipes" / name).read_text().splitlines()[0].removeprefix("# ")
    _, script, stored = shlex.split(command)
    drawn = tmp_path / "drawn.svg"
    runpy.run_path(str(ROOT / script))["main"]([str(drawn)])
    kept = (ROOT / stored).read_text()
    if f"Matplotlib v{importlib.metadata.version('matplotlib')}," in kept:  # others may place a path differently
        (words, numbers), (kept_words, kept_numbers) = parts_of(drawn.read_text()), parts_of(kept)
        assert words == kept_words
        moved = sum(abs(x - y) > 1e-6 for x, y in zip(numbers, kept_numbers, strict=True))
        assert moved <= (SIMULATED_PICTURE * len(numbers) if name == "draw_bandit.py" else 0)


def parts_of(picture: str) -> tuple[list[str], list[float]]:
    """A picture's text, and the numbers in it."""
    parts = re.split(r"(-?\d+\.\d+)", picture)
    return parts[::2], [float(x) for x in parts[1::2]]
