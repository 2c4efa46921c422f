"""`slsam-peft sharpness` on tiny models: what it measures, on what, and what it leaves alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.adapters.load import load_adapted, open_adapter
from slsam_peft.adapters.sharpness import adapter_space, full_space, objective_of
from slsam_peft.cli.main import main
from slsam_peft.data.examples import load_examples
from slsam_peft.data.scoring import score
from slsam_peft.sharpness.curvature import CENTRAL, DOUBLE_BACKWARD, HessianVector
from tests.handed import adapted, save_adapter, save_base
from tests.tiny import build, completions, conversations, llama, lora, texts, tokenizer
from tests.tolerances import FLOAT32_NORMS

LLM = {"task_type": "CAUSAL_LM"}
FEW = "--rows 6 --ascent_steps 2 --draws 2 --lanczos_steps 4 --line_points 5 --plane_points 3".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharpness")
    save_adapter(folder / "adapter", folder / "base", lora(**LLM))
    completions(9, seed=1).to_json(folder / "train.jsonl")
    conversations(7, seed=5).to_json(folder / "held.jsonl")
    texts(5).to_json(folder / "texts.jsonl")
    return folder


@pytest.fixture
def case():
    """An adapter on a tiny Llama in float64 with its rows."""
    model = adapted(llama(attn_implementation="eager").double(), lora(**LLM)).double()
    rows = load_examples_of(completions(6))
    return model, rows, objective_of(model, rows, 4)


def load_examples_of(data):
    encoder = tokenizer()
    from slsam_peft.data.scoring import tokenize

    return [tokenize(encoder, (row["prompt"], row["completion"]), 64) for row in data]


def test_the_loss_is_the_one_of_the_answers(case):
    model, rows, objective = case
    assert objective.value() == pytest.approx(score(model, rows).loss, rel=1e-6)  # scored in float32
    ids = torch.tensor([rows[0].ids])
    labels = ids.clone()
    labels[0, : rows[0].prompt] = -100
    assert objective_of(model, rows[:1], 4).value() == pytest.approx(
        float(model(ids, labels=labels).loss.detach()), rel=1e-6
    )


def test_the_full_weights_branch_is_the_weight_itself(case):
    model, rows, objective = case
    expected, moved = [], {}
    layers = [m for n, m in model.named_modules() if n.endswith(("_proj",))]
    offsets = [1e-2 * torch.randn(m.weight.shape, dtype=torch.float64) for m in layers]
    with torch.no_grad():
        for layer, offset in zip(layers, offsets, strict=True):
            moved[layer] = layer.base_layer.weight.clone()
            layer.base_layer.weight.add_(offset)
    expected = objective.value()
    with torch.no_grad():
        for layer, weight in moved.items():
            layer.base_layer.weight.copy_(weight)
    before = objective.value()
    with full_space(model) as space:
        for p in space.parameters:
            p.data = p.data.double()
        assert len(space.parameters) == len(layers)
        with space.moved():
            space.move(offsets)
            assert objective.value() == pytest.approx(expected, rel=1e-7)
        assert objective.value() == before
        merged = layers[3].base_layer.weight + layers[3].get_delta_weight("default")
        assert torch.allclose(space.weight(3).double(), merged, atol=1e-6)
    assert objective.value() == before
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_curvature_needs_no_differences_on_plain_weights(case):
    model, _, objective = case
    parameters = adapter_space(model).parameters
    product = HessianVector(objective, parameters)
    assert product.method == DOUBLE_BACKWARD
    vectors = [torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in range(2)]
    first, second = (product(v) for v in vectors)
    assert float(first @ vectors[1]) == pytest.approx(float(second @ vectors[0]), rel=FLOAT32_NORMS)


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    outputs = {name: tmp_path / f"flat.{name}" for name in ("json", "png")}
    arguments = [folder / "adapter", "--data", folder / "train.jsonl", "--eval_data", folder / "held.jsonl"]
    arguments += ["--output", outputs["json"], "--plot", outputs["png"], *FEW]
    assert main(["--debug", "sharpness", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(outputs["json"].read_text())
    assert set(found["spaces"]) == {"adapter", "full weight"}
    assert found["spaces"]["adapter"]["parameters"] == sum(t.numel() for t in weights.values())
    assert found["rows"] == {"training": 6, "held-out": 6}
    for space in found["spaces"].values():
        for name, data in space["data"].items():
            assert set(data) == {"worst case", "average", "adaptive worst case", "adaptive average"}
            for kind in ("worst case", "adaptive worst case"):
                assert data[kind]["rise"] >= data[kind]["one_step"] > 0
                assert len(data[kind]["by_start"]) == 2
            middle = space["line"]["loss"][name][2]
            assert space["line"]["places"][2] == 0
            assert middle == pytest.approx(found["loss"][name], abs=1e-6)
        assert space["plane"]["loss"][1][1] == pytest.approx(found["loss"]["training"], abs=1e-6)
    worst = {k: s["data"]["training"]["worst case"]["rise"] for k, s in found["spaces"].items()}
    assert f"{worst['adapter']:+.4f}" in shown
    for name in ("training", "held-out"):
        curvature = found["curvature"][name]
        assert curvature["method"] == DOUBLE_BACKWARD
        assert curvature["agreement"] > 0.99
        assert curvature["top"] > curvature["bottom"]
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert f"Plot: {outputs['png']}" in shown.replace("\n", "")


def test_a_quantized_base_is_measured_as_it_was_trained(folder, tmp_path, monkeypatch):
    base = LlamaForCausalLM.from_pretrained(
        folder / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    trainer = build(SLSAMTrainer, tmp_path / "run", SLSAMConfig(), model=base, peft_config=lora(**LLM), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model, encoder = load_adapted(
        open_adapter(tmp_path / "adapter"), dtype=torch.float32, trainable=True, attention="eager"
    )
    assert model.base_model.model.is_loaded_in_4bit
    rows = load_examples(encoder, str(folder / "train.jsonl"), rows=4, max_length=64)
    objective = objective_of(model, rows, 4)
    product = HessianVector(objective, adapter_space(model).parameters)
    assert product.method in (DOUBLE_BACKWARD, CENTRAL)
    vector = torch.randn(adapter_space(model).size, generator=torch.Generator().manual_seed(0))
    other = HessianVector(objective, adapter_space(model).parameters, CENTRAL)(vector)
    assert torch.nn.functional.cosine_similarity(product(vector), other, dim=0) > 0.9
    with full_space(model) as space:
        loss, gradient = objective.gradient(space.parameters)
        assert loss == pytest.approx(objective.value(), rel=1e-5)
        assert all(g.any() for g in gradient)


KINDS = {"text": "texts.jsonl", "completion": "train.jsonl", "conversation": "held.jsonl"}


@pytest.mark.parametrize("file", KINDS.values(), ids=KINDS)
def test_kinds_of_data(file, folder):
    found = load_examples(tokenizer(), str(folder / file), rows=3, max_length=24)
    assert len(found) == 3
    assert all(row.prompt < len(row.ids) <= 24 for row in found)


BAD = {
    "no data": (["--data", "gone.jsonl"], "gone.jsonl does not exist"),
    "no held-out data": (["--eval_data", "gone.jsonl"], "gone.jsonl does not exist"),
    "another base": (["--model", "other"], "does not fit other: base_model"),
    "radius": (["--rho", "0"], "--rho=0.0 is not allowed; it must be a finite number > 0"),
    "radius not a number": (["--rho", "nan"], "--rho=nan is not allowed"),
    "steps": (["--ascent_steps", "0"], "--ascent_steps=0 is not allowed; it must be an integer >= 1"),
    "rows": (["--rows", "0"], "--rows=0 is not allowed"),
    "picture's type": (["--plot", "a.pdf"], "the name must end in .png or .svg"),
    "picture of nothing": (["--plot", "a.png", "--line_points", "0", "--plane_points", "0"], "nothing to show"),
    "no folder": (["--output", "deep/a.json"], "the folder of deep/a.json does not exist"),
    "file exists": (["--output", "mine.json"], "mine.json exists already"),
    "no answer within reach": (["--max_length", "1"], "no row has an answer within 1 tokens; raise --max_length"),
    "preferences": (["--data", "preferences.jsonl"], "preferences.jsonl, line 1: 'prompt' without 'completion'"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_input(arguments, expected, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "preferences.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    if arguments[:1] == ["--model"]:
        save_base(tmp_path / "other", hidden_size=48)
    command = ["sharpness", str(folder / "adapter"), "--data", str(folder / "train.jsonl"), *FEW, *arguments]
    if arguments[0] != "--model":
        command += ["--model", str(folder / "base")]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(command) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
