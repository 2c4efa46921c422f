"""Finds the low-rank pairs of a PEFT model, with their scales and the weights that they adapt."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from slsam_peft.algorithm.factors import Factors
from slsam_peft.algorithm.stack import Pair


def factors_of(model: nn.Module) -> list[Factors]:
    """Return the pairs of trained LoRA factors on linear modules: plain ones, whose product with x is added to W x.

    DoRA and other variants, biases of factors, embeddings, convolutions and adapters of bare parameters are no such
    pairs.

    Args:
        model (`nn.Module`): The model, adapters attached.
    """
    return [
        factors
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        for factors in _factors_of(name, module)
    ]


def _factors_of(name: str, layer: Any) -> Iterator[Factors]:
    for adapter, pair in plain_pairs(layer):
        base = layer.get_base_layer()
        weight, computes_in = _weight_of(base)
        yield Factors(name, pair, float(layer.scaling[adapter]), base, weight, computes_in)


def _weight_of(
    base: Any,
) -> tuple[Callable[[], torch.Tensor] | None, Callable[[torch.Tensor], torch.dtype | None] | None]:
    """Return what gives a frozen linear module's weight, and what it computes in; see `Factors`."""
    if type(base) is nn.Linear:
        return lambda: base.weight.detach(), None
    if type(base).__name__ != "Linear4bit":
        return None, None
    from bitsandbytes.functional import dequantize_4bit

    def computes_in(input: torch.Tensor) -> torch.dtype | None:
        if not base.compute_type_is_set:  # as its own first forward settles it
            base.set_compute_type(input)
            base.compute_type_is_set = True
        return base.compute_dtype

    return lambda: dequantize_4bit(base.weight.data, base.weight.quant_state), computes_in


def plain_pairs(layer: Any) -> Iterator[tuple[str, Pair]]:
    """Return the trained plain pairs of a LoRA layer, with the names of their adapters."""
    for name, down in layer.lora_A.items():
        up: Any = layer.lora_B[name] if name in layer.lora_B else None
        varied = layer.use_dora.get(name, False) or name in getattr(layer, "lora_variant", {})
        if varied or not (_is_plain(down) and _is_plain(up)):
            continue
        if down.weight.requires_grad and up.weight.requires_grad and down.bias is None and up.bias is None:
            yield name, Pair(down, up)


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear one as torch has it; hooks of accelerate, for one, replace its `forward`."""
    return type(module) is nn.Linear and "forward" not in vars(module)
