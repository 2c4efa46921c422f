"""What once ended in a traceback, or in a bad adapter without a word: settings, files and rows that do not fit."""

import json
import re
import shutil
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig
from trl import ModelConfig

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.adapters.arms import read_structure
from slsam_peft.adapters.load import base_config, fit, open_adapter
from slsam_peft.adapters.merge import Merge
from slsam_peft.cli.arguments import _check_config, build_parser, read_config
from slsam_peft.cli.main import main
from slsam_peft.errors import DivergedError, UserError
from slsam_peft.models.load import load_config
from slsam_peft.models.positions import learns_positions
from slsam_peft.presets import METHODS
from slsam_peft.runs import finetune
from slsam_peft.runs.compare.reading import parse_settings
from slsam_peft.runs.compare.run import expected_costs
from slsam_peft.runs.sequences import check_positions
from tests.tiny import build, llama, lora, sft_args, tokenizer, train
from tests.tolerances import SOLVED_BUDGET

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
CONFIG = SLSAMConfig(active_fraction=0.5)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "num_train_epochs", "adam_epsilon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(name: str, value: float) -> None:
    settings = make_dataclass("Settings", [(name, float)])(value)
    with pytest.raises(UserError, match=f"{name}=.* must be a finite number"):
        finetune.check_finite(settings)


def test_no_clipping_is_an_infinite_norm(tmp_path: Path) -> None:
    finetune.check_finite(sft_args(tmp_path, max_grad_norm=float("inf")), ModelConfig())


def test_an_adapter_that_is_not_finite_is_not_saved() -> None:
    model = nn.Linear(2, 2)
    finetune.check_trained(model, "out")
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"1 of 2 trained tensors .*\(weight\)"):
        finetune.check_trained(model, "out")


def test_a_metric_that_no_evaluation_gives() -> None:
    args: Any = SimpleNamespace(metric_for_best_model="foo", eval_strategy="steps")
    with pytest.raises(UserError, match="metric_for_best_model=foo is not allowed: .* eval_loss"):
        finetune.check_metric(args)
    for name in ("eval_loss", "mean_token_accuracy", None):
        args.metric_for_best_model = name
        finetune.check_metric(args)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dataset_train_split: 5", "line 1: dataset_train_split: 5 is not allowed; it must be a text"),
        ("dataset_train_split: [train]", "must be a text"),
        ("output_dir: 5", "output_dir: 5 is not allowed; it must be a text: write it in quotes, '5'"),
        ("lora_target_modules: 5", "a text, or a list of texts"),
        ("lora_target_modules: {a: b}", "a text, or a list of texts"),
        ("lora_target_modules: [5]", "a text, or a list of texts"),
        ("model_init_kwargs: [a]", "it must be a mapping"),
        ("run_name: 2024-12-31", "write it in quotes"),
        ("run_name: 2024-31-12", "a value cannot be read: month must be in 1..12"),
        ("resume_from_checkpoint: true", ""),
        ("lora_target_modules: [q_proj]", ""),
        ("model_init_kwargs: {dtype: float32}", ""),
        ("report_to: [none]", ""),
        ("pad_to_multiple_of: 8", ""),
        ("fsdp: full_shard", ""),
    ],
)
def test_values_of_a_file_are_of_their_kind(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(line + "\n")

    def read() -> None:
        values, lines = read_config(str(file))
        _check_config(build_parser(), str(file), values, lines)

    if not said:
        read()
        return
    with pytest.raises(UserError) as error:
        read()
    assert said in str(error.value)


@pytest.mark.parametrize("values", [{"hidden_size": "x"}, {"num_attention_heads": 0}], ids=str)
def test_a_model_with_values_of_a_wrong_kind(values: dict, tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=f"model {tmp_path} cannot be read"):
        load_config(str(tmp_path))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    llama().save_pretrained(folder / "base")
    base = llama()
    base.name_or_path = str(folder / "base")
    get_peft_model(base, lora(task_type="CAUSAL_LM")).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def _changed(adapter: Path, folder: Path, values: dict) -> Path:
    spoilt = Path(shutil.copytree(adapter, folder / "a"))
    file = spoilt / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return spoilt


@pytest.mark.parametrize("values", [{"r": "x"}, {"target_modules": 5}, {"target_modules": "(q_proj"}], ids=str)
def test_an_adapter_with_values_of_a_wrong_kind(values: dict, adapter: Path, tmp_path: Path) -> None:
    spoilt = _changed(adapter, tmp_path, values)
    opened = open_adapter(spoilt)
    assert "adapter_config.json" in " ".join(fit(opened, base_config(opened)).shape)
    with pytest.raises(UserError, match="the arms of .* cannot be told"):
        read_structure(spoilt)


def test_a_base_that_is_no_name(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names 5 as its base model; name it with --model"):
        open_adapter(_changed(adapter, tmp_path, {"base_model_name_or_path": 5}))


def test_repeated_blocks_fit_and_are_not_merged(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    settings = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[(0, 3), (2, 5)], task_type="CAUSAL_LM")
    trainer = build(SLSAMTrainer, tmp_path / "out", CONFIG, model=base, peft_config=settings)
    trainer.save_model(str(tmp_path / "out"))
    opened = open_adapter(tmp_path / "out", str(tmp_path / "base"))
    config = base_config(opened)
    assert opened.record is not None
    assert opened.record["base"]["shape"]["num_hidden_layers"] == 6
    assert fit(opened, config)
    files: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match="layer_replication"):
        Merge(opened, config, files)


def test_positions_in_a_picture_are_not_those_of_a_text() -> None:
    tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"position_embedding": nn.Embedding(4, 8)})})
    assert not learns_positions(tower)
    assert learns_positions(nn.ModuleDict({"position_embedding": nn.Embedding(4, 8)}))


def _prepared(model: nn.Module, length: int) -> Any:
    rows = Dataset.from_list([{"input_ids": [1] * length}])
    return SimpleNamespace(model=model, train_dataset=rows, eval_dataset=None)


def test_more_tokens_than_positions(caplog: pytest.LogCaptureFixture) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=205, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    check_positions(_prepared(model, 64))
    with pytest.raises(UserError, match="longest row has 65 tokens, and the model has embeddings for 64 positions"):
        check_positions(_prepared(model, 65))
    check_positions(_prepared(llama(), 128))
    assert "longest row" not in caplog.text
    check_positions(_prepared(llama(), 129))
    assert "The longest row has 129 tokens, and the model was made for 128" in caplog.text


@pytest.mark.parametrize(
    ("setting", "good"), [("lora_modules_to_save", "lm_head"), ("lora_target_parameters", "mlp.up_proj.weight")]
)
def test_names_without_an_effect(setting: str, good: str) -> None:
    settings: dict[str, Any] = {setting.removeprefix("lora_"): [good], "target_modules": ["q_proj"]}
    model = get_peft_model(llama(), lora(**settings))
    finetune.check_named(model, ModelConfig(**{setting: [good]}))
    with pytest.raises(UserError, match=f"{setting}: 'nosuch' matches nothing"):
        finetune.check_named(model, ModelConfig(**{setting: [good, "nosuch"]}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(SLSAMTrainer, folder, CONFIG, **SAVING)
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_config": lora(lora_alpha=999)}, "another adapter: lora_alpha=8 there, 999 here"),
        ({"peft_config": lora(r=8)}, "another adapter: r=4 there, 8 here"),
        ({"peft_config": lora(target_modules=["q_proj"])}, "another adapter: target_modules="),
        ({"optim": "sgd"}, "another optimizer: optim=adamw_torch_fused there, sgd here"),
        ({"max_steps": 1}, "has made 2 steps, of a run of 2, and this one has 1"),
        ({"model": "other"}, "another base model"),
    ],
    ids=["alpha", "rank", "targets", "optimizer", "fewer steps", "base"],
)
def test_a_checkpoint_of_another_run_is_refused(changes: dict, said: str, checkpoint: Path, tmp_path: Path) -> None:
    if changes.get("model") == "other":
        model = llama()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        changes = {"model": model}
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, **{"max_steps": 4, **changes})
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_other_settings_of_training_are_told_once(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, max_steps=3, learning_rate=5e-3, seed=7)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3
    assert caplog.text.count("was made with other settings: learning_rate=0.01 there, 0.005 here, seed=42") == 1


def test_other_rows_are_told(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, max_steps=3)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "made with other settings" not in caplog.text
    rows = trainer.train_dataset
    trainer = build(SLSAMTrainer, tmp_path, CONFIG, max_steps=3)
    trainer.train_dataset = rows.select(range(1, len(rows)))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert f"other settings: its {len(rows)} training rows are not the {len(rows) - 1} here (other data" in caplog.text


def test_starting_afresh_beside_old_checkpoints_is_told(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint.parent, tmp_path / "run"))
    train(SLSAMTrainer, folder, CONFIG, **{**SAVING, "max_steps": 1})
    assert "holds checkpoints of an earlier run, up to checkpoint-2" in caplog.text


def test_a_base_cut_short_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20000])
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    words = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", "--report_to", "none"]
    assert main(["sft", *words]) == 2
    assert "cannot be trained with these settings" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora_target_modules", "embed_tokens"]], ids=["two blocks", "one arm"])
def test_a_plan_of_few_arms(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(num_hidden_layers=2).config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"]["active_fraction"] >= 1 / len(plan["arms"])


def test_a_comparison_of_more_tokens_than_positions_is_refused_before_training(tmp_path: Path) -> None:
    folder = str(tmp_path / "opt")
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    OPTConfig(vocab_size=205, word_embed_proj_dim=32, max_position_embeddings=64, **sizes).save_pretrained(folder)
    values = {
        "model": folder,
        "training": {"steps": 2, "max_length": 65},
        "tasks": {"docs": {"source": "stdlib_docs", "rows": 8}},
        "methods": {"plain": {"learning_rates": [1e-3]}},
        "seeds": [0],
        "tuning_seed": 1,
        "match": "epochs",
    }
    with pytest.raises(UserError, match=r"training.max_length=65 is more than the 64 positions .*; set 64 or less"):
        expected_costs(parse_settings(values))


def test_every_method_by_its_name_alone_has_an_expected_cost_in_a_comparison(tmp_path: Path) -> None:
    """Also one that has a budget unless told otherwise, which is solved for as training does it."""
    llama(num_hidden_layers=4).config.save_pretrained(tmp_path)
    values = {
        "model": str(tmp_path),
        "training": {"steps": 2, "max_length": 32, "lora_r": 2},
        "tasks": {"docs": {"source": "stdlib_docs", "rows": 8}},
        "methods": {"plain": {"learning_rates": [1e-3]}}
        | {method: {"learning_rates": [1e-3], "slsam": {"method": method}} for method in METHODS},
        "seeds": [0],
        "tuning_seed": 1,
        "match": "epochs",
    }
    costs = expected_costs(parse_settings(values))
    assert list(costs) == ["plain", *METHODS]
    assert costs["depth"] == pytest.approx(1.0, abs=SOLVED_BUDGET)
    assert 1.0 < costs["auto"] < costs["paper"] < costs["sam"]
