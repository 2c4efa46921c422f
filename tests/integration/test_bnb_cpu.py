"""4-bit layers stay trainable after an evaluation on the CPU."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from slsam_peft.models.bnb_cpu import keep_trainable


@pytest.fixture
def layer() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"))
    return layer.to("cpu")  # quantises


def input_gradient(layer: torch.nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 128).reshape(2, 64).requires_grad_()
    layer.train()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_gradient_is_the_same_before_and_after_an_evaluation(layer: torch.nn.Sequential) -> None:
    keep_trainable(layer)
    before = input_gradient(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(2, 64))
    assert before.abs().sum() > 0
    assert torch.equal(input_gradient(layer), before)


def test_a_weight_that_is_repacked_already_is_refused(layer: torch.nn.Sequential) -> None:
    layer[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"the 4-bit weight of 0 was repacked for inference .* Load the model again"):
        keep_trainable(layer)


def test_models_without_4bit_layers_are_left_alone() -> None:
    plain = torch.nn.Linear(3, 3)
    keep_trainable(plain)
    assert not hasattr(plain, "support_avx512bf16_for_cpu")
