"""`slsam-peft check`: what it finds in adapters that are whole, damaged, or on the wrong base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slsam_peft import SLSAMConfig, SLSAMTrainer
from slsam_peft.cli.main import main
from slsam_peft.errors import UserError
from slsam_peft.saving.recorded import read_record
from tests.handed import save_adapter, save_base
from tests.tiny import build, llama, lora

LLM = {"task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter as `SLSAMTrainer` saves it, with its base."""
    folder = tmp_path_factory.mktemp("trained")
    save_base(folder / "base")
    model = llama().from_pretrained(folder / "base")
    config = SLSAMConfig(rho=0.07, active_fraction=0.6, design="depth")
    trainer = build(SLSAMTrainer, folder / "run", config, model=model, peft_config=lora(lora_dropout=0.1, **LLM))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of it that may be damaged."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in (trained / "adapter").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def check(capsys, monkeypatch):
    """Run the command; return its exit code and each finding's mark and text."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*words):
        code = main(["--debug", "check", *map(str, words)])
        lines = capsys.readouterr().out.splitlines()
        split = [line.split("  ", 1) for line in lines if "  " in line]
        rows = [(mark.strip(), rest.strip()) for mark, rest in split]
        return code, {rest.split("  ", 1)[0]: (mark, rest) for mark, rest in rows}, lines

    return run


def change(folder, **values):
    """Replace tensors of an adapter's file: by name, a function of the old values."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for part, function in values.items():
        name = next(n for n in tensors if part in n)
        tensors[name] = function(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_adapter_that_is_as_it_was(trained, check):
    code, found, lines = check(trained / "adapter")
    assert code == 0
    for what in ("values", "base's shape", "modules", "unused tensors", "plain PEFT", "base's weights", "logits"):
        assert found[what][0] == "ok", lines
    text = "\n".join(lines)
    for part in ("rho=0.07", "design=depth", "steps=3", "learning_rate=0.01", "float32, not quantised", "peft 0."):
        assert part in text


def own_bandit(probabilities, mask, norms, inclusion):
    """A bandit of a user's own."""
    return probabilities


def test_an_adapter_trained_with_a_users_bandit(trained, tmp_path, check):
    """The record has the function's name, and that is what is shown; the function itself is not needed."""
    model = llama().from_pretrained(trained / "base")
    config = SLSAMConfig(active_fraction=1.0, bandit=own_bandit)
    trainer = build(SLSAMTrainer, tmp_path / "run", config, model=model, peft_config=lora(**LLM), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    code, found, lines = check(tmp_path / "adapter")
    assert code == 0
    assert f"bandit={own_bandit.__module__}:own_bandit" in "\n".join(lines)
    words = ["--merge", "--no_measure", "--output", str(tmp_path / "merged")]
    assert main(["--debug", "export", str(tmp_path / "adapter"), *words]) == 0
    assert f"bandit={own_bandit.__module__}:own_bandit" in (tmp_path / "merged/README.md").read_text()


RECORDED = {
    "no method": ("method",),
    "no base": ("base",),
    "a list for a base": ("base", []),
    "a list as a setting": ("method.rho", [1]),
    "no number of updates": ("training.steps",),
    "a word for a rate": ("training.learning_rate", "fast"),
    "no versions": ("versions",),
    "unknown dtype": ("base.dtype", "float33"),
    "an integer dtype": ("base.dtype", "int8"),
    "a number for a dtype": ("base.dtype", 32),
    "an unknown field": ("base.shape", {"hiden_size": 32}),
    "a word for settings": ("base.quantisation", "nf4"),
    "quantised, and not known what": ("base.quantisation", {"load_in_4bit": True}),
    "words in place of samples": ("base.values", {"lm_head.weight": ["a", "b", "c", "d"]}),
    "part of a probe": ("probe", [[0.0]]),
    "no probe": ("probe",),
}


@pytest.mark.parametrize("change", RECORDED.values(), ids=RECORDED)
def test_a_record_that_was_not_written_so_is_refused(change, adapter):
    recorded(adapter, *change)
    with pytest.raises(UserError, match=r"slsam\.json is damaged \(\w") as caught:
        read_record(adapter)
    assert (change[0] if change[-1] != {"load_in_4bit": True} else "base.unquantised") in str(caught.value)
    assert "Copy it again" in str(caught.value)


def test_an_export_writes_nothing_before_the_record_is_known_good(adapter, tmp_path, capsys):
    recorded(adapter, "base.shape")
    for words in (["--merge"], []):
        assert main(["export", str(adapter), "--output", str(tmp_path / "out"), *words]) == 2
        assert "base.shape is missing" in " ".join(capsys.readouterr().err.split())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_a_record_holds_what_tells_a_base(trained):
    record = json.loads((trained / "adapter/slsam.json").read_text())
    assert record["base"]["quantisation"] is None
    assert record["base"]["shape"]["num_hidden_layers"] == 5
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(
        record["base"]["values"]
    )
    assert not [name for name in record["base"]["values"] if "lora" in name or "base_layer" in name]


DAMAGE = {
    "NaN": ({"layers.2.mlp.up_proj.lora_B": lambda t: t * float("nan")}, "values"),
    "infinite": ({"layers.0.self_attn.q_proj.lora_A": lambda t: t / 0}, "values"),
    "zero": ({"layers.1.mlp.down_proj.lora_B": torch.zeros_like}, "training"),
    "other values": ({"layers.1.mlp.down_proj.lora_B": lambda t: t + 0.1}, "logits"),
    "other shape": ({"layers.1.mlp.down_proj.lora_B": lambda t: t[:-1].contiguous()}, "modules"),
}


@pytest.mark.parametrize(("values", "what"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found(values, what, adapter, check):
    change(adapter, **values)
    code, found, lines = check(adapter)
    assert code == 1
    assert found[what][0] == "problem", lines
    if what in ("values", "training"):
        assert next(iter(values)) in found[what][1]


def test_missing_and_unused_tensors_are_found(adapter, check):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.3.mlp.up_proj.lora_A" in n)
    tensors[name.replace("layers.3", "layers.9")] = tensors.pop(name)
    save_file(tensors, file)
    code, found, lines = check(adapter)
    assert code == 1
    assert "layers.3.mlp.up_proj.lora_A" in found["modules"][1], lines
    assert "layers.9.mlp.up_proj.lora_A" in found["unused tensors"][1], lines


def test_a_base_with_other_weights_is_found(adapter, tmp_path, check):
    base = save_base(tmp_path / "other")
    with torch.no_grad():
        base.model.layers[2].input_layernorm.weight.mul_(1.1)
    base.save_pretrained(tmp_path / "other")
    code, found, lines = check(adapter, "--model", tmp_path / "other")
    assert code == 1
    assert found["base's weights"][0] == "problem"
    assert "1 of " in found["base's weights"][1]
    assert "model.layers.2.input_layernorm.weight" in found["base's weights"][1]
    assert found["logits"][0] == "problem", lines


def test_a_base_in_other_precision_is_the_same_base(adapter, tmp_path, check):
    save_base(tmp_path / "rounded", torch.bfloat16)
    code, found, lines = check(adapter, "--model", tmp_path / "rounded")
    assert found["base's weights"][0] == "ok", lines


def test_a_base_of_another_shape_is_found(adapter, tmp_path, check):
    save_base(tmp_path / "other", num_hidden_layers=4, hidden_size=48)
    code, found, lines = check(adapter, "--model", tmp_path / "other")
    assert code == 1
    assert "num_hidden_layers is 4, trained on 5" in found["base's shape"][1]
    assert found["modules"][0] == "problem", lines
    assert "layers.4" in found["unused tensors"][1]


def test_adapters_of_other_trainers_can_be_checked(tmp_path, check):
    save_adapter(tmp_path / "adapter", tmp_path / "base", lora(**LLM))
    code, found, lines = check(tmp_path / "adapter")
    assert code == 0
    assert found["plain PEFT"][0] == "ok"
    assert (found["base's weights"][0], found["logits"][0]) == ("not known", "not known"), lines


def test_saving_changes_neither_modes_nor_random_numbers(trained, tmp_path):
    trainer = build(SLSAMTrainer, tmp_path / "run", SLSAMConfig(), peft_config=lora(lora_dropout=0.1, **LLM))
    trainer.model.train()
    modes = [m.training for m in trainer.model.modules()]
    state = torch.get_rng_state()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/slsam.json").is_file()
    assert modes == [m.training for m in trainer.model.modules()]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_that_fails_does_not_lose_the_adapter(tmp_path, monkeypatch, caplog):
    trainer = build(SLSAMTrainer, tmp_path / "run", SLSAMConfig(), peft_config=lora(**LLM))
    monkeypatch.setattr("slsam_peft.saving.record.probe", lambda model: 1 / 0)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter/slsam.json").exists()
    assert "slsam.json was not written" in caplog.text


BAD = {
    "no folder": (lambda f: f / "gone", "does not exist (from "),
    "no adapter": (lambda f: f.parent, "holds no adapter: adapter_config.json is missing"),
    "settings": (lambda f: (f / "adapter_config.json").write_text("{") and f, "adapter_config.json cannot be read"),
    "weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no") and f, "is damaged"),
    "cut off": (lambda f: cut(f / "adapter_model.safetensors") and f, "is damaged"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink() or f, "does not exist."),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin") and f,
        "adapter_model.bin is a pickle and is not read",
    ),
    "record": (lambda f: (f / "slsam.json").write_text("[]") and f, "slsam.json is damaged"),
    "record without a value": (lambda f: recorded(f, "base.dtype") and f, "base.dtype is missing"),
    "record of odd values": (
        lambda f: recorded(f, "base.values", {"lm_head.weight": [1.0]}) and f,
        "base.values.lm_head.weight is [1.0]; it must be a list of 4 numbers",
    ),
    "newer record": (lambda f: (f / "slsam.json").write_text('{"schema": 9}') and f, "has schema 9"),
}


def recorded(folder, place, *value):
    """Set a value of an adapter's record, or take it out."""
    file = folder / "slsam.json"
    *way, last = place.split(".")
    record = inner = json.loads(file.read_text())
    for key in way:
        inner = inner[key]
    if value:
        inner[last] = value[0]
    else:
        del inner[last]
    return file.write_text(json.dumps(record))


def cut(file):
    return file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_checked(spoil, said, adapter, capsys):
    folder = spoil(adapter)
    assert main(["check", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown


def test_a_base_that_is_not_there(adapter, capsys):
    assert main(["check", str(adapter), "--model", "./nowhere"]) == 2
    assert "--model=./nowhere is not a folder" in capsys.readouterr().err
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    assert main(["check", str(adapter)]) == 2
    assert "base model /gone/base is not here; name its folder or hub name with --model" in capsys.readouterr().err
