"""`slsam-peft inspect`: arms, sizes and norms from an adapter's or a model's own files."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from slsam_peft.adapters import arms as adapter_arms
from slsam_peft.adapters.inspect import inspect
from slsam_peft.algorithm.arms import arms_of
from slsam_peft.cli.main import main
from slsam_peft.saving.trace_data import FILE_NAME
from tests.tiny import llama, lora
from tests.traces import write_trace

ADAPTER = "adapter_model.safetensors"
KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some blocks": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def adapted(folder, base, **settings):
    """Save an adapter of random weights and return its model."""
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)  # it would look for the base model
    return model


def norm(tensors):
    return float(torch.cat([t.detach().flatten() for t in tensors]).double().norm())


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
@pytest.mark.parametrize("with_base", [True, False], ids=["base at hand", "names alone"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_an_adapters_arms_are_those_it_was_trained_with(settings, with_base, granularity, base, tmp_path):
    model = adapted(tmp_path, base if with_base else "owner/elsewhere", **settings)
    found = inspect(str(tmp_path), granularity)
    rows = {row.name: row for row in found.rows}
    wanted = {arm.name: arm for arm in arms_of(model, granularity)}
    assert rows.keys() == wanted.keys()
    if with_base:
        assert list(rows) == list(wanted)
    for name, arm in wanted.items():
        row = rows[name]
        assert (row.depth, row.tensors, row.parameters) == (arm.depth, len(arm.parameters), arm.size)
        assert row.bytes == 4 * arm.size
        assert row.norm == pytest.approx(norm(arm.parameters), rel=1e-5)
    assert bool(found.notes) is not with_base
    assert with_base or "'owner/elsewhere' is not at hand" in found.notes[0]


@pytest.mark.parametrize("with_base", [True, False], ids=["base at hand", "names alone"])
@pytest.mark.parametrize("kind", ["LoRA", "patterns", "embeddings"])
def test_what_an_adapter_adds_is_measured_without_the_base_weights(kind, with_base, base, tmp_path):
    model = adapted(tmp_path, base if with_base else "owner/elsewhere", **KINDS[kind])
    for row in inspect(str(tmp_path), "block").rows:
        layers = [m for m in model.get_submodule(row.name).modules() if hasattr(m, "get_delta_weight")]
        deltas = [layer.get_delta_weight("default") for layer in layers]
        assert row.change == pytest.approx(norm(deltas), rel=1e-5)
    assert all(row.change is None for row in inspect(str(tmp_path), "tensor").rows)


def test_dora_adds_more_than_its_factors_so_nothing_is_claimed(base, tmp_path):
    adapted(tmp_path, base, use_dora=True)
    assert all(row.change is None for row in inspect(str(tmp_path), "block").rows)


def test_a_models_arms_and_norms(base, tmp_path):
    """In one file, in shards, and where one block is quantised."""
    model = llama()
    llama().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (base, tmp_path / "shards"):
        found = inspect(str(folder), "block")
        wanted = arms_of(model, "block")
        assert [(r.name, r.depth, r.parameters) for r in found.rows] == [(a.name, a.depth, a.size) for a in wanted]
        assert [r.norm for r in found.rows] == pytest.approx([norm(a.parameters) for a in wanted], rel=1e-5)
        assert found.notes == []
    shutil.copytree(base, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 16, dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    packed = inspect(str(tmp_path / "packed"), "block")
    assert [row.name for row in packed.rows if row.norm is None] == ["model.layers.2"]
    assert "1 tensors are stored in another form" in packed.notes[0]


def test_the_table_shows_every_arm_and_the_sums(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    adapted(tmp_path, base)
    names = [row.name for row in inspect(str(tmp_path), "block").rows]
    trace = write_trace(tmp_path, (names, list(range(5))), 8)
    assert (tmp_path / FILE_NAME).is_file()
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"Adapter {tmp_path}" in shown
    assert "method LORA, r 4, lora_alpha 8" in shown
    rows = [line for line in shown.splitlines() if "block " in line]
    assert [row.split()[1:3] for row in rows] == [["block", str(i)] for i in range(5)]
    assert [row.split()[-2] for row in rows] == [f"{count / 8:.0%}" for count in trace.activity.tolist()]
    total = sum(row.parameters for row in inspect(str(tmp_path), "block").rows)
    footer = next(line for line in shown.splitlines() if "5 arms" in line)
    assert f"{total:,}" in footer
    assert main(["inspect", str(base), "--granularity", "module"]) == 0
    assert "layers.0.self_attn.q_proj" in capsys.readouterr().out
    assert main(["inspect", "smollm2-135m"]) == 0
    assert "134,515,008" in capsys.readouterr().out


def make(folder, base):
    """Folders that cannot be inspected."""
    adapted(folder / "good", base)
    for name in ("cut", "pickled", "bare", "malformed", "prompts", "odd"):
        shutil.copytree(folder / "good", folder / name)
    (folder / "cut" / ADAPTER).write_bytes((folder / "cut" / ADAPTER).read_bytes()[:-9])
    (folder / "pickled" / ADAPTER).rename(folder / "pickled" / "adapter_model.bin")
    (folder / "bare" / ADAPTER).unlink()
    (folder / "malformed" / "adapter_config.json").write_text("{")
    (folder / "prompts" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"})
    )
    config = json.loads((folder / "odd" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "owner/elsewhere"
    (folder / "odd" / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.layers.0.q.lora_A.weight": torch.zeros(2, 2)}, folder / "odd" / ADAPTER)
    (folder / "nothing").mkdir()
    (folder / "run" / "checkpoint-3").mkdir(parents=True)
    (folder / "run" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    shutil.copytree(base, folder / "model")
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cut"], f"{ADAPTER} is damaged ("),
        (["pickled"], "adapter_model.bin is a pickle, which may run code when it is opened, so it is not."),
        (["model"], "pytorch_model.bin is a pickle"),
        (["bare"], f"bare holds no {ADAPTER}: the weights are missing."),
        (["malformed"], "adapter_config.json cannot be read"),
        (["prompts"], "prompts holds prompts (PROMPT_TUNING)"),
        (["odd"], "the arms of odd cannot be told"),
        (["nothing"], "nothing holds neither adapter_config.json nor config.json"),
        (["run"], "There are adapters in: run/checkpoint-3."),
        (["./nowhere"], "the folder ./nowhere does not exist"),
        (["good/adapter_config.json"], "is a file; name the folder it is in."),
        (["smollm2-135n"], "Did you mean 'smollm2-135m'?"),
        (["good", "--granularity", "layer"], "invalid choice: 'layer'"),
    ],
)
def test_bad_input(arguments, expected, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened a pickle"))
    make(tmp_path, base)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["inspect", *arguments]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_adapter_of_another_base_is_told_from_its_own_names(base, tmp_path):
    """The configuration that its settings name has other sizes."""
    adapted(tmp_path / "adapter", tmp_path / "other")
    llama(hidden_size=64).config.save_pretrained(tmp_path / "other")
    found = inspect(str(tmp_path / "adapter"), "block")
    assert len(found.rows) == 5
    assert "does not fit the configuration of its base model" in found.notes[0]
    assert adapter_arms.read_structure(tmp_path / "adapter").note == found.notes[0]
