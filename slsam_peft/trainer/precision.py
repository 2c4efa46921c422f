"""Looks after the precision of adapters under TRL, which PEFT and quantized bases change behind one's back."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)

Snapshot = dict[str, torch.Tensor]

_LOW = (torch.bfloat16, torch.float16)


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the base weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def float32_adapters(model: Any) -> Snapshot:
    """Return copies of the trainable float32 parameters of a quantised model that already carries an adapter."""
    if not isinstance(model, nn.Module) or not is_quantized(model):
        return {}
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}


def restore_float32(model: nn.Module, before: Snapshot) -> None:
    """Undo TRL's cast of QLoRA adapters to bfloat16, in which late optimizer its steps round to nothing.

    A parameter in `before` gets its float32 values back; a new adapter's factors are widened. Models that are not
    quantised are left as they are.

    Args:
        model (`nn.Module`): The trainer's model.
        before (`dict[str, torch.Tensor]`): What `float32_adapters` returned before the trainer was built.
    """
    if not is_quantized(model):
        return
    factors = _adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype not in _LOW:
            continue
        if name in before:
            parameter.data = before[name].to(parameter.device)
        elif parameter in factors:
            parameter.data = parameter.detach().float()


@contextmanager
def same_dtypes(model: nn.Module) -> Iterator[None]:
    """Give the parameters, after the block, the dtypes they had before it: PEFT's `load_adapter` widens 16 bits."""
    before = {name: p.dtype for name, p in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.detach().to(before[name])


def warn_if_low_precision(model: nn.Module) -> None:
    """Warn once where adapters are trained in 16 bits."""
    dtypes = {p.dtype for p in _adapter_parameters(model) if p.requires_grad and p.dtype in _LOW}
    if dtypes:
        logger.warning(
            "the adapter is trained in %s: once the learning rate has decayed, its steps round to nothing there. "
            "float32 adapters (adapter_dtype='float32' on a quantised base, PEFT's autocast_adapter_dtype=True "
            "elsewhere) cost 12 bytes more per parameter and keep them.",
            " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
        )


def _adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {p for m in model.modules() if isinstance(m, BaseTunerLayer) for p in m.parameters()}
