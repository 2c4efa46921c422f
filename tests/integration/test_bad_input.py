"""Whatever cannot be done ends with exit code 2 and a message of a few lines, and changes no file."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.cli import quickstart
from slsam_peft.cli.main import SUBCOMMANDS, main
from slsam_peft.errors import UserError
from tests import bad_input
from tests.bad_input import PLAN, SFT
from tests.tiny import build, llama, lora, tokenizer
from tests.unit.test_data import BAD_FILES

COMPARISONS = {**bad_input.COMPARISONS, **bad_input.COMPARISONS_LATE}
MOST_LINES = 8  # quoted errors of other libraries included

# TRL sets fields of transformers by their old names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

Snapshot = dict[str, tuple[int, bytes | None]]


def snapshot(folder: Path) -> Snapshot:
    """Every file and folder with its content and time of change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, None)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    """A folder with models, data, adapters and settings, good and bad, and what is in it."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_plain_files()
        make_adapters()
    finally:
        os.chdir(before)
    return folder, snapshot(folder)


def make_plain_files() -> None:
    for name in ("void", "bare", "bare-folder", "full", "data", "adapters"):
        Path(name).mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("bare/config.json").write_text('{"model_type": "llama"}')
    Path("plan-broken.json").write_text("{")
    Path("plan-strange.json").write_text('{"model_type": "no_such_model"}')
    Path("train.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5 w6"}\n')
    # It has a configuration and no weights: an error about anything else came before it was loaded.
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    for i, content in enumerate(content for content, _ in bad_input.SFT_FILES.values()):
        Path(f"sft-{i}.yaml").write_text(content)
    for i, (name, content, _) in enumerate(BAD_FILES.values()):
        Path(f"data/{i}").mkdir()
        Path(f"data/{i}/{name}").write_bytes(content)
    Path("data/cut").mkdir()
    Path("data/cut/a.jsonl").write_text('{"text": "a"}\n{"te')
    Path("good.yaml").write_text(bad_input.COMPARISON)
    Path("puzzles.yaml").write_text(
        bad_input.COMPARISON.replace("stdlib_docs", "reasoning_gym, puzzle: basic_arithmetic")
    )
    for i, (old, new, _) in enumerate(COMPARISONS.values()):
        assert old in bad_input.COMPARISON
        Path(f"compare-{i}.yaml").write_text(bad_input.COMPARISON.replace(old, new))


def make_adapters() -> None:
    """A small model, an adapter for it, and copies of the adapter with one thing spoilt."""
    llama().save_pretrained("small")
    tokenizer().save_pretrained("small")
    base = llama()
    base.name_or_path = "small"
    model = get_peft_model(base, lora(task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    model.save_pretrained("adapter")
    weights = Path("adapter/adapter_model.safetensors").read_bytes()
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    for name in ("settings", "cut", "header", "missing", "pickle", "task", "shape", "base"):
        shutil.copytree("adapter", f"adapters/{name}")
    Path("adapters/settings/adapter_config.json").write_text("{")
    Path("adapters/cut/adapter_model.safetensors").write_bytes(weights[:-100])
    Path("adapters/header/adapter_model.safetensors").write_bytes(weights[:1] + b"\x7f" + weights[2:])
    Path("adapters/missing/adapter_model.safetensors").unlink()
    os.rename("adapters/pickle/adapter_model.safetensors", "adapters/pickle/adapter_model.bin")
    Path("adapters/task/adapter_config.json").write_text(json.dumps(settings | {"task_type": "SEQ_CLS"}))
    Path("adapters/shape/adapter_config.json").write_text(json.dumps(settings | {"r": 2}))
    shutil.copytree("small", "untemplated")
    Path("untemplated/chat_template.jinja").unlink()
    shutil.copytree("small", "small-cut")
    cut(Path("small-cut/model.safetensors"))
    other = json.dumps(settings | {"base_model_name_or_path": "small-cut"})
    Path("adapters/base/adapter_config.json").write_text(other)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cases() -> Iterator[tuple[str, list[str], list[str]]]:
    """All of them: name, words, what is said."""
    for table in (bad_input.WORDS, bad_input.PLAN_FLAGS, bad_input.COMPARE, bad_input.ADAPTERS, bad_input.SEEN):
        yield from ((" ".join(words), words, [said]) for words, said in table)
    for name, table in (("quickstart", bad_input.QUICKSTART), ("bench", bad_input.BENCH)):
        yield from ((" ".join([name, *words]), [name, *words], [said]) for words, said in table)
    for name, (words, said) in bad_input.SFT_FLAGS.items():
        yield f"sft: {name}", [*SFT, *words], said
    for i, (name, (_, said)) in enumerate(bad_input.SFT_FILES.items()):
        yield f"sft, settings: {name}", [*SFT, "--config", f"sft-{i}.yaml"], said
    for i, (name, (file, _, said)) in enumerate(BAD_FILES.items()):
        yield f"sft, data: {name}", [*SFT, "--dataset_name", f"data/{i}/{file}"], [file, *said]
    for i, (name, (_, _, said)) in enumerate(COMPARISONS.items()):
        file = [f"compare-{i}.yaml"] if name in bad_input.COMPARISONS else []
        yield f"compare: {name}", ["compare", "--config", f"compare-{i}.yaml"], [*file, said]


CASES = list(cases())


def test_the_table_is_long() -> None:
    assert len(CASES) >= 60
    assert {words[0] for _, words, _ in CASES} >= set(SUBCOMMANDS)


@pytest.fixture
def inside(world: tuple[Path, Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder, without a hub, and let nothing be downloaded or begun."""
    monkeypatch.chdir(world[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(quickstart, "_train", lambda *_: pytest.fail("trained"))
    return world[0]


def assert_refused(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(words)
    shown = capsys.readouterr().err
    assert code == 2, shown
    message = shown[shown.index("slsam-peft: ") :]
    assert all(part in " ".join(message.split()) for part in said), message
    assert "Traceback" not in shown
    assert len(message.splitlines()) <= MOST_LINES, message


@pytest.mark.parametrize(("words", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused(
    words: list[str],
    said: list[str],
    inside: Path,
    world: tuple[Path, Snapshot],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(words, said, capsys)
    assert snapshot(inside) == world[1]


@pytest.mark.parametrize(("words", "package", "said"), bad_input.EXTRAS, ids=lambda value: str(value)[:40])
def test_a_package_that_is_missing(
    words: list[str],
    package: str,
    said: str,
    inside: Path,
    world: tuple[Path, Snapshot],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(words, [said], capsys)
    assert snapshot(inside) == world[1]


@pytest.mark.parametrize("words", [["sft", "--debug", "--rho", "-1"], ["--debug", "check", "gone"]], ids=" ".join)
def test_debug_shows_the_error(words: list[str], inside: Path) -> None:
    with pytest.raises(UserError):
        main([*SFT, *words[1:]] if words[0] == "sft" else words)


@pytest.mark.parametrize(
    ("words", "broken"),
    [
        (["export", "adapter", "--output", "new"], "slsam_peft.adapters.export.copy_adapter"),
        (
            ["export", "adapter", "--output", "new", "--merge", "--no_measure"],
            "slsam_peft.adapters.export.write_merged",
        ),
        (PLAN, "slsam_peft.cli.plan.run"),
        ([*SFT, "--model_name_or_path", "small"], "transformers.Trainer.train"),
    ],
    ids=["export", "merge", "anything", "sft"],
)
def test_a_full_disk(
    words: list[str],
    broken: str,
    inside: Path,
    world: tuple[Path, Snapshot],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(broken, full)
    assert_refused(words, ["No space left on device"], capsys)
    assert snapshot(inside) == world[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `slsam-peft sft`'s trainer after two steps."""
    folder = tmp_path_factory.mktemp("made")
    config = SLSAMConfig(active_fraction=0.5)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build(SLSAMTrainer, folder, config, **settings).train()
    return folder / "checkpoint-2"


def spoil(folder: Path, how: str) -> None:
    what, damage = how.split()
    names = {"slsam": "slsam.safetensors", "state": "trainer_state.json", "adapter": "adapter_model.safetensors"}
    names |= {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "random": "rng_state.pth"}
    names |= {"hashes": "slsam_files.json"}
    file = folder / names[what]
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(("how", "said"), bad_input.CHECKPOINTS.items(), ids=bad_input.CHECKPOINTS)
def test_a_spoilt_checkpoint(
    how: str,
    said: list[str],
    inside: Path,
    world: tuple[Path, Snapshot],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoilt = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, spoilt)
    spoil(spoilt, how)
    before = snapshot(spoilt)
    words = ["--model_name_or_path", "small", "--resume_from_checkpoint", str(spoilt), "--active_fraction", "0.5"]
    words += ["--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "all-linear", "--max_steps", "4"]
    assert_refused([*SFT, *words], said, capsys)
    assert snapshot(spoilt) == before
    assert snapshot(inside) == world[1]


def test_the_adapter_itself_is_good(inside: Path) -> None:
    """What the table spoils is refused for that alone."""
    assert torch.isfinite(next(PeftModel.from_pretrained(llama(), "adapter").parameters())).all()
