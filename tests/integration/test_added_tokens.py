"""Every tool takes adapters that were trained with more embeddings than their base has, and adapters with a name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.adapters.load import load_adapted, open_adapter
from slsam_peft.cli.main import main
from slsam_peft.errors import UserError
from tests.tiny import build, llama, lora, texts, tokenizer
from tests.tolerances import MERGED_LOGITS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]

ADDED = 8
WORDS = len(tokenizer())
NEW = list(range(WORDS, WORDS + ADDED))
IDS = torch.tensor([[5, 6, 7, NEW[0], NEW[-1], 9]])

# How PEFT can be told to train the tokens that were added.
WAYS: dict[str, dict[str, Any]] = {
    "modules to save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens and head": {"trainable_token_indices": {"embed_tokens": NEW}, "modules_to_save": ["lm_head"]},
    "head alone": {"modules_to_save": ["lm_head"]},
    "nothing of them": {},
    "tied, nothing of them": {},
}


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter trained on it with added tokens, and the logits it had."""
    folder = tmp_path_factory.mktemp("added")
    llama(tie_word_embeddings=request.param.startswith("tied")).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(WORDS + ADDED)
    settings = lora(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **WAYS[request.param])
    trainer = build(SLSAMTrainer, folder / "out", SLSAMConfig(active_fraction=1.0), model=model, peft_config=settings)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        return folder / "base", folder / "out", trainer.model.eval()(IDS).logits


def test_it_is_loaded_exactly_on_the_base_it_names(trained: tuple[Path, Path, torch.Tensor]) -> None:
    _, out, logits = trained
    model, _ = load_adapted(open_adapter(out))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_every_tool_takes_it(
    trained: tuple[Path, Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, logits = trained
    assert main(["check", str(out)]) == 0, capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "Structure from the adapter's own names" not in capsys.readouterr().out
    assert main(["chat", str(out), "--prompt", "w1", "--max_new_tokens", "2"]) == 0
    merged = tmp_path / "merged"
    assert main(["export", str(out), "--output", str(merged), "--merge", "--no_measure"]) == 0
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
    torch.testing.assert_close(found, logits, atol=MERGED_LOGITS, rtol=0)


@pytest.mark.filterwarnings("ignore:The PEFT config.s `base_model_name_or_path`:UserWarning")
def test_it_is_loaded_on_a_base_that_was_resized(trained: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    folder, out, logits = trained
    resized = AutoModelForCausalLM.from_pretrained(folder)
    resized.resize_token_embeddings(WORDS + ADDED)
    resized.save_pretrained(tmp_path / "resized")
    model, _ = load_adapted(open_adapter(out, str(tmp_path / "resized")))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(  # PEFT puts single tokens on a whole model only
    "trained", [way for way in WAYS if "trainable_token_indices" not in WAYS[way]], indirect=True
)
def test_its_arms_are_told_without_its_base(
    trained: tuple[Path, Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in trained[1].iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "./gone"}))
    assert main(["inspect", str(copy)]) == 0
    assert "Structure from the adapter's own names" in capsys.readouterr().out


def test_a_base_whose_added_rows_are_lost_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(WORDS + ADDED)
    model: Any = get_peft_model(base, lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "out", save_embedding_layers=False)
    with pytest.raises(UserError, match=r"213 embeddings instead of 205, and has no model\.embed_tokens\.weight"):
        load_adapted(open_adapter(tmp_path / "out"))


@pytest.fixture
def run_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".datasets")
    llama().save_pretrained("base")
    tokenizer().save_pretrained("base")
    rows = [
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": f"w{i}"}]} for i in range(4)
    ]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*words: str) -> int:
        given = ["--model_name_or_path", "base", "--dataset_name", "a.jsonl", "--output_dir", "out", "--use_cpu"]
        given += ["--bf16", "false", "--report_to", "none", "--max_steps", "2", "--disable_tqdm", "true"]
        return main(["sft", *given, "--save_strategy", "no", "--active_fraction", "1", *words])

    return run


@pytest.mark.parametrize("template", ["other", "other/chat_template.jinja"], ids=["of a model", "of a file"])
def test_the_lines_that_sft_prints_load_its_adapter(
    run_sft: Callable[..., int], template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tokenizer()
    other.add_tokens([f"new{i}" for i in range(ADDED)])
    other.save_pretrained("other")
    assert run_sft("--chat_template_path", template) == 0
    said = capsys.readouterr().out
    lines = said[said.index("Load it:") + len("Load it:") :].strip().splitlines()
    assert len(lines) == (3 if template == "other" else 1)
    names: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    exec("\n".join(lines[:-1]), names)  # noqa: S102
    model = eval(lines[-1], names)  # noqa: S307
    assert main(["check", "out"]) == 0
    with torch.no_grad():
        expected = load_adapted(open_adapter("out"))[0](IDS[:, :3]).logits
        assert torch.equal(model.eval()(IDS[:, :3]).logits, expected)


def test_an_adapter_with_a_name_has_its_record_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, lora(task_type="CAUSAL_LM"), adapter_name="mine")
    config = SLSAMConfig(active_fraction=1.0)
    trainer = build(SLSAMTrainer, tmp_path / "out", config, model=model, data=texts(), peft_config=None)
    trainer.train()
    trainer.save_model()
    named = tmp_path / "out/mine"
    assert (named / "slsam.json").is_file()
    assert main(["check", str(named)]) == 0
    assert "no slsam.json beside it" not in capsys.readouterr().out
    # One that lies a folder above, as earlier versions wrote it, is found where it can be of this adapter alone.
    (named / "slsam.json").rename(tmp_path / "out/slsam.json")
    assert open_adapter(named).record is not None
    (tmp_path / "out/other").mkdir()
    (tmp_path / "out/other/adapter_config.json").write_bytes((named / "adapter_config.json").read_bytes())
    assert open_adapter(named).record is None
    with pytest.raises(UserError, match=r"There are adapters in: .*mine, .*other\."):
        open_adapter(tmp_path / "out")
