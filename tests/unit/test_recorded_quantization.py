"""A recorded quantisation is repeated as the kind it was, or refused by name."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from slsam_peft import SLSAM, SLSAMConfig, SLSAMTrainer, arms_of
from slsam_peft.adapters.quantization import settings_of
from slsam_peft.cli.main import main
from slsam_peft.errors import UserError
from slsam_peft.saving.record import sample_base
from tests.decoders import batch, closures, move
from tests.reference import assert_gradients_are, reference_step
from tests.tiny import build, llama, lora, tokenizer
from tests.tolerances import FLOAT32_NORMS

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
INT8_TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
HQQ = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}},
    "skip_modules": ["lm_head"],
}
PLAIN = LlamaConfig()


def quantized(method: str) -> LlamaConfig:
    return LlamaConfig(quantization_config={"quant_method": method})


def test_a_base_that_was_not_quantised_is_not() -> None:
    assert settings_of(None, PLAIN, torch.float32, "base") is None


def test_bitsandbytes_computes_in_the_models_dtype() -> None:
    made = settings_of(NF4, PLAIN, torch.bfloat16, "base")
    assert isinstance(made, BitsAndBytesConfig)
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


@pytest.mark.parametrize(
    "recorded", [{"quant_method": "quanto", "weights": "int8"}, HQQ, INT8_TORCHAO], ids=["quanto", "hqq", "torchao"]
)
def test_what_is_not_installed_is_said(recorded: dict[str, Any]) -> None:
    if find_spec(PACKAGES[recorded["quant_method"]]) is not None:
        pytest.skip(f"{PACKAGES[recorded['quant_method']]} is installed here")
    with pytest.raises(UserError, match=rf"quantised by {recorded['quant_method']}, which cannot be loaded here: "):
        settings_of(recorded, PLAIN, torch.float32, "base")


def test_what_transformers_does_not_quantise_while_it_loads_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """HQQ's loader has no operations for it in transformers 5."""

    class Loader:
        def __init__(self, settings: Any, **kwargs: Any) -> None:
            self.quantization_config = settings

        def validate_environment(self, **kwargs: Any) -> None:
            """Say that everything is installed."""

        get_quantize_ops = HfQuantizer.get_quantize_ops

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quanto", Loader)
    reason = "quantised by quanto, which cannot be loaded here: .*QUANTO is not available yet"
    with pytest.raises(UserError, match=reason):
        settings_of({"quant_method": "quanto", "weights": "int8"}, PLAIN, torch.float32, "base")


def test_hqq_is_refused_where_transformers_does_not_quantise_so() -> None:
    pytest.importorskip("hqq", reason="hqq is not installed; the test above stands in for it")
    with pytest.raises(UserError, match="quantised by hqq, which cannot be loaded here: .*HQQ is not available yet"):
        settings_of(HQQ, PLAIN, torch.float32, "base")


PACKAGES = {"quanto": "optimum", "torchao": "torchao", "hqq": "hqq"}


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "own"])
def test_what_files_hold_is_read_from_files_alone(method: str) -> None:
    recorded = {"quant_method": method, "bits": 4}
    assert settings_of(recorded, quantized(method), torch.float16, "base") is None
    with pytest.raises(UserError, match=rf"quantised by {method}, and base is not: .* Name the quantised model"):
        settings_of(recorded, PLAIN, torch.float16, "base")


@pytest.mark.parametrize("changes", [{"bnb_4bit_quant_type": 3}, {"llm_int8_threshold": "high"}])
def test_settings_of_odd_types_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"base model base cannot be quantised as recorded: .*slsam\.json"):
        settings_of(NF4 | changes, PLAIN, torch.float32, "base")


class Packed(torch.Tensor):
    """A tensor of a library's own, which looks like a plain one and lets nobody read its values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("reshape", "__getitem__", "float"):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_packed_weights_are_no_samples_of_the_base() -> None:
    model = llama()
    layer: Any = model.model.layers[0].self_attn.q_proj
    weight = layer.weight.data.as_subclass(Packed)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.requires_grad_(False)
    names = sample_base(model)
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    assert "model.layers.1.self_attn.q_proj.weight" in names


def assert_steps_are_exact(model: Any) -> None:
    """Check steps against the slow reference, cut and reused ones too."""
    move(model)
    arms = arms_of(model)
    closure, forward_only = closures(model, batch())
    for descent in ("active", "all"):
        mask = torch.tensor([False, False, True, False, True])
        config = SLSAMConfig(rho=0.3, active_fraction=0.5, design=lambda p, g, m=mask: m, descent=descent)
        trained = None if descent == "active" else torch.ones_like(mask)
        _, expected = reference_step(arms, mask, 0.3, closure, trained)
        slsam = SLSAM(arms, config)
        slsam.update(closure, forward_only=forward_only)
        assert slsam.horizon is not None
        assert slsam.horizon.reuse
        assert_gradients_are(expected, [p for arm in arms for p in arm.parameters], FLOAT32_NORMS)


def settings_in(library: str, kind: str) -> Any:
    """Return what loads a base quantised by a library, and skip the test where that is not installed."""
    packed = pytest.importorskip("torchao.quantization" if library == "torchao" else library)
    if library == "torchao":
        made = getattr(packed, kind)
        return transformers.TorchAoConfig(made(weight_dtype=torch.int8) if kind.startswith("Intx") else made())
    return transformers.QuantoConfig(weights=kind)


WEIGHT_ONLY = [
    ("optimum.quanto", "int8"),
    ("optimum.quanto", "int4"),
    ("optimum.quanto", "int2"),
    ("torchao", "Int8WeightOnlyConfig"),
    ("torchao", "Float8WeightOnlyConfig"),
]


@pytest.mark.parametrize(("library", "kind"), WEIGHT_ONLY)
def test_packed_bases_have_their_record_and_are_loaded_as_they_were(
    library: str, kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_in(library, kind)
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=128, intermediate_size=128).save_pretrained("base")  # int4 is packed in groups of 128
    tokenizer().save_pretrained("base")
    options = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    model, other = (AutoModelForCausalLM.from_pretrained("base", **options) for _ in range(2))
    packed = model.model.layers[0].self_attn.q_proj.weight
    assert type(packed) not in (torch.Tensor, torch.nn.Parameter), "the case shows nothing on a plain weight"
    adapter = lora(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    assert_steps_are_exact(get_peft_model(other, adapter))
    trainer = build(SLSAMTrainer, "out", SLSAMConfig(active_fraction=1.0), model=model, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    recorded = json.loads(Path("out", "slsam.json").read_text())["base"]["quantization"]
    assert kind.lower() in json.dumps(recorded).lower()
    assert main(["check", "out"]) == 0, capsys.readouterr().out
    assert library.rpartition(".")[2] in capsys.readouterr().out


NO_BACKWARD = r"q_proj\S* is quantised so that it passes no gradient on .*Quantise weights alone"


@pytest.mark.parametrize("kind", ["Int8DynamicActivationInt8WeightConfig"])
def test_bases_with_quantised_activations_are_refused_by_name(kind: str, tmp_path: Any) -> None:
    settings = settings_in("torchao", kind)
    llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "base")
    options = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    with pytest.raises(ValueError, match=NO_BACKWARD):
        build(SLSAMTrainer, tmp_path / "out", SLSAMConfig(), model=model)


class OneWay(torch.Tensor):
    """A packed weight whose product has no backward pass, as kernels of quantised activations have none."""

    one_way = True

    def __tensor_flatten__(self) -> Any:
        """Say that it is packed, as tensors of quantisation libraries do."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made.detach() if func is torch.nn.functional.linear and cls.one_way else made


class BothWays(OneWay):
    """The same with a backward pass."""

    one_way = False


@pytest.mark.parametrize("kind", [OneWay, BothWays])
def test_layers_that_pass_no_gradient_on_are_refused_by_name(kind: Any, tmp_path: Any) -> None:
    model = llama()
    layer: Any = model.model.layers[3].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(kind), requires_grad=False)
    assert isinstance(layer.weight, kind)
    if kind is BothWays:
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model)
        return
    with pytest.raises(ValueError, match=rf"layers\.3\.self_attn\.{NO_BACKWARD}"):
        build(SLSAMTrainer, tmp_path, SLSAMConfig(), model=model)
