"""Adapters of PEFT models: their precision under TRL, and which parts of a batch an ascent may take."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)

Snapshot = dict[str, torch.Tensor]


def float32_adapters(model: Any) -> Snapshot:
    """Return copies of the trainable float32 parameters of a model that already carries an adapter."""
    if not isinstance(model, nn.Module):
        return {}
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}


def restore_float32(model: nn.Module, before: Snapshot) -> None:
    """Undo TRL's cast of QLoRA adapters to bfloat16, in which late optimizer updates round to nothing.

    A parameter in `before` gets its float32 values back; a new adapter's factors are widened.

    Args:
        model (`nn.Module`): The trainer's model.
        before (`dict[str, torch.Tensor]`): What `float32_adapters` returned before the trainer was built.
    """
    adapters = {p for m in model.modules() if isinstance(m, BaseTunerLayer) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        if name in before:
            parameter.data = before[name].to(parameter.device)  # noqa: SLF001
        elif parameter in adapters:
            parameter.data = parameter.detach().float()


def warn_if_low_precision(model: nn.Module) -> None:
    """Warn once where the user keeps adapters in 16 bits."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            "adapter_dtype='keep' leaves trainable parameters in %s: once the learning rate has decayed, updates "
            "round to nothing there. adapter_dtype='float32' costs 12 bytes more a parameter and keeps them.",
            " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
        )


def ascent_part(inputs: Mapping[str, Any], fraction: float) -> tuple[dict[str, Any], float]:
    """Return the first sequences of a batch, and their share.

    Args:
        inputs (`Mapping`): A batch; every tensor whose first dimension is that of `input_ids` is cut.
        fraction (`float`): Share of the sequences, in (0, 1]; rounded, at least one.

    Returns:
        `tuple[dict, float]`: The smaller batch and the share it really is.

    Raises:
        ValueError: the batch holds one sequence (packed and padding-free batches count as one).
    """
    rows = next((v.shape[0] for k, v in inputs.items() if k in ("input_ids", "inputs_embeds", "labels")), 0)
    if rows < 2:
        raise ValueError(
            f"ascent='partial' cannot take a part of a batch of {rows} sequence (a packed or padding-free batch "
            "counts as one); use gradient_accumulation_steps > 1 (whole micro-batches are taken then), a larger "
            "per_device_train_batch_size, or ascent='two_pass'."
        )
    taken = max(1, round(fraction * rows))
    cut = {k: v[:taken] if isinstance(v, torch.Tensor | list) and len(v) == rows else v for k, v in inputs.items()}
    return cut, taken / rows
