"""Adapters handed on: plain PEFT folders and merged models, with what they compute."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.cli.main import main
from slsam_peft.models.bnb_cpu import keep_trainable
from tests.handed import logits, save_adapter, save_base
from tests.tiny import build, completions, lora
from tests.tolerances import MERGED_LOGITS

LLM = {"task_type": "CAUSAL_LM"}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
PROJECTIONS = {"target_modules": ["q_proj", "down_proj"], **LLM}

# Settings of the adapter, settings of the base, whether head and embeddings stop sharing a tensor.
KINDS = {
    "LoRA": (lora(**LLM), {}, False),
    "rank-stabilised LoRA": (lora(use_rslora=True, **LLM), {}, False),
    "DoRA": (lora(use_dora=True, **LLM), {}, False),
    "LoRA of several ranks": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, **LLM), {}, False),
    "LoRA and trained biases": (lora(bias="all", **LLM), BIASED, False),
    "LoRA with a bias of its own": (lora(lora_bias=True, **LLM), BIASED, False),
    "LoRA on a tied base": (lora(**LLM), TIED, False),
    "LoRA on a tied head": (peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **LLM), TIED, True),
    "LoRA on embeddings": (peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], **LLM), {}, False),
    "a trained head": (lora(modules_to_save=["lm_head"], **LLM), {}, False),
    "trained embeddings of a tied base": (lora(modules_to_save=["embed_tokens"], **LLM), TIED, True),
    "trained norms": (lora(modules_to_save=["norm", "input_layernorm"], **LLM), {}, False),
    "trained tokens": (lora(trainable_token_indices=[3, 7], **LLM), {}, False),
    "IA3": (peft.IA3Config(feedforward_modules=["down_proj"], **PROJECTIONS), {}, False),
    "LoHa": (peft.LoHaConfig(r=2, **PROJECTIONS), {}, False),
    "OFT": (peft.OFTConfig(r=0, oft_block_size=4, **PROJECTIONS), {}, False),
}


def export(adapter, out, *arguments):
    return main(["--debug", "export", str(adapter), "--output", str(out), *arguments])


@pytest.fixture
def folders(tmp_path):
    """A base of several shards and an adapter on it."""
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", lora(**LLM))
    return tmp_path, model


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied and of saved embeddings
@pytest.mark.parametrize(("config", "base", "untied"), KINDS.values(), ids=KINDS)
def test_merged_logits_are_the_adapters(config, base, untied, tmp_path):
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", config, **base)
    assert export(tmp_path / "adapter", tmp_path / "out", "--merge", "--no_measure", "--max_shard_size", "20KB") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(model), rtol=0, atol=MERGED_LOGITS)
    with model.disable_adapter():
        assert not torch.allclose(logits(merged), logits(model), rtol=0, atol=10 * MERGED_LOGITS)
    assert merged.config.tie_word_embeddings is (bool(base.get("tie_word_embeddings")) and not untied)


REFUSED = {
    "PiSSA": (lora(init_lora_weights="pissa", **LLM), "init_lora_weights='pissa', which changes the base"),
    "parameters": (
        peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"], **LLM),
        "is a ParamWrapper of PEFT",
    ),
    "LN tuning": (
        peft.LNTuningConfig(target_modules=["input_layernorm"], **LLM),
        "does not merge into its base layer",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_by_tensor_is_refused(config, expected, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", tmp_path / "base", config)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--merge"]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_merged_model_is_complete(folders):
    folder, model = folders
    assert (
        export(folder / "adapter", folder / "out", "--merge", "--dtype", "bfloat16", "--max_shard_size", "20KB") == 0
    )
    index = json.loads((folder / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    sizes = 0
    for name in files:
        with safe_open(folder / "out" / name, framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert {t.dtype for t in tensors} == {torch.bfloat16}
        shard = sum(t.nbytes for t in tensors)
        assert shard <= 20_000
        sizes += shard
    assert index["metadata"]["total_size"] == sizes
    merged = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert merged.dtype == torch.bfloat16
    assert merged.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template
    modes = {file.stat().st_mode for file in (folder / "out").iterdir()}
    assert modes == {(folder / "base/config.json").stat().st_mode}, "a server of another user can read all of it"
    card = (folder / "out/README.md").read_text()
    assert "A LORA adapter merged into its base, in bfloat16." in card
    assert "library_name: transformers" in card


def test_a_plain_export_computes_the_same_bits(folders):
    folder, model = folders
    (folder / "adapter/optimizer.pt").write_bytes(b"of a checkpoint")
    assert export(folder / "adapter", folder / "out") == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, folder / "out")), logits(model))
    assert not (folder / "out/optimizer.pt").exists()


def test_nothing_is_overwritten_without_force(folders, capsys):
    folder, _ = folders
    out = folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = ["export", str(folder / "adapter"), "--output", str(out)]
    for arguments, expected in (([], "is not empty"), (["--force"], "--force replaces earlier exports only")):
        assert main([*command, *arguments]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
        assert [(p.name, p.read_text()) for p in out.iterdir()] == [("notes.txt", "mine")]
    (out / "notes.txt").unlink()
    assert main(command) == 0
    assert main([*command, "--merge", "--no_measure"]) == 2
    assert not (out / "model.safetensors").exists()
    assert main([*command, "--merge", "--no_measure", "--force"]) == 0
    assert (out / "model.safetensors").exists()
    assert not (out / "adapter_model.safetensors").exists()  # of the export that was replaced


def test_a_failure_leaves_nothing(folders, monkeypatch):
    folder, _ = folders
    before = sorted(folder.rglob("*"))

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slsam_peft.adapters.export.serialize_file", full)
    assert (
        main(["export", str(folder / "adapter"), "--output", str(folder / "deep/out"), "--merge", "--no_measure"]) == 2
    )
    assert [p for p in sorted(folder.rglob("*")) if p.name != "deep"] == before


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """An adapter trained by `SLSAMTrainer` on an NF4 base, and that base in 16 bits."""
    folder = tmp_path_factory.mktemp("nf4")
    save_base(folder / "base", torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cpu"},
    )
    config = SLSAMConfig(rho=0.05, active_fraction=0.6)
    trainer = build(SLSAMTrainer, folder / "run", config, model=base, data=completions(), peft_config=lora(**LLM))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    completions(8, seed=3).to_json(folder / "held.jsonl")
    return folder


def test_a_merge_into_a_quantized_base_asks_for_a_choice(quantized, capsys):
    command = ["export", str(quantized / "adapter"), "--output", str(quantized / "none"), "--merge"]
    assert main(command) == 2
    shown = " ".join(capsys.readouterr().err.split())
    for part in ("trained on a quantised base", "--base original", "--base dequantized"):
        assert part in shown
    assert not (quantized / "none").exists()


@pytest.mark.parametrize("way", ["original", "dequantized"])
def test_both_ways_are_measured_before_one_is_written(way, quantized, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--merge", "--base", way, "--dtype", "float32", "--eval_data", str(quantized / "held.jsonl")]
    assert export(quantized / "adapter", tmp_path / way, *arguments) == 0
    shown = capsys.readouterr().out
    rows = {n: line for n in ("original", "dequantized") for line in shown.splitlines() if f" {n} " in line}
    assert set(rows) == {"original", "dequantized"}
    assert "(written)" in rows[way]
    assert shown.index("original") < shown.index("The merged model is in")
    difference = {n: float(line.split("│")[2].split()[0]) for n, line in rows.items()}
    assert difference["dequantized"] < MERGED_LOGITS < 100 * MERGED_LOGITS < difference["original"]
    change = {n: float(line.split("│")[5].split("(")[1].rstrip(") ")) for n, line in rows.items()}
    assert abs(change["dequantized"]) <= 1e-4 < abs(change["original"])


def test_the_dequantized_merge_is_what_was_trained(quantized, tmp_path):
    arguments = ["--merge", "--base", "dequantized", "--dtype", "float32", "--no_measure"]
    assert export(quantized / "adapter", tmp_path / "out", *arguments) == 0
    base = AutoModelForCausalLM.from_pretrained(
        quantized / "base",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cpu"},
    )
    keep_trainable(base)  # repacking fails on layers of fewer inputs than a block has, on a CPU with AVX512-BF16
    trained = logits(peft.PeftModel.from_pretrained(base, quantized / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(merged, trained, rtol=0, atol=MERGED_LOGITS)


def test_a_choice_that_makes_no_sense_is_refused(tmp_path, capsys):
    trainer = build(SLSAMTrainer, tmp_path / "run", SLSAMConfig(), peft_config=lora(**LLM), max_steps=1)
    save_base(tmp_path / "base")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    command = [
        "export",
        str(tmp_path / "adapter"),
        "--output",
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "base"),
    ]
    assert main([*command, "--merge", "--base", "original"]) == 2
    assert "was trained on a base that was not quantised" in capsys.readouterr().err
    assert main([*command, "--base", "original"]) == 2
    assert "--base belongs to a merge" in capsys.readouterr().err


PEAK = """
import sys
from pathlib import Path
from slsam_peft.cli.main import main
small, adapter, out = sys.argv[1:]
flags = ["--merge", "--no_measure", "--max_shard_size", "30MB"]
assert main(["export", small, "--output", out + "-small", *flags]) == 0  # loads every library
def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
assert main(["export", adapter, "--output", out, *flags]) == 0
print(memory("VmHWM") - before, file=sys.stderr)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "shard",
    [pytest.param("40MB", marks=pytest.mark.slow), pytest.param("10GB", marks=pytest.mark.slow)],
    ids=["sharded base", "base in one file"],
)
def test_peak_memory_stays_below_two_shards_and_the_adapter(shard, tmp_path):
    save_adapter(tmp_path / "small", tmp_path / "small-base", lora(**LLM))
    base = save_base(
        tmp_path / "base", hidden_size=512, intermediate_size=1024, num_hidden_layers=14, num_key_value_heads=4
    )
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    if shard != "10GB":
        (tmp_path / "base/model.safetensors").unlink()
    model = peft.get_peft_model(base, lora(**LLM))
    base.config._name_or_path = model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    weights = sum(p.nbytes for p in base.parameters())
    adapter = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    del base, model
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("small", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rise = int(done.stderr.splitlines()[-1])
    shards = [p.stat().st_size for p in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(shards) > 4
    bound = 2 * max(shards) + adapter
    assert bound < weights / 2, "the case shows nothing unless the model is much larger than the bound"
    assert rise < bound
