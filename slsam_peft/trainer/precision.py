"""Adapters of PEFT models: their precision under TRL, and which parts of a batch an ascent may take."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl import DPOTrainer, RewardTrainer

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
    """Undo TRL's cast of QLoRA adapters to bfloat16, in which late optimizer updates round to nothing.

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
            "the adapter is trained in %s: once the learning rate has decayed, updates round to nothing there. "
            "float32 adapters (adapter_dtype='float32' on a quantised base, PEFT's autocast_adapter_dtype=True "
            "elsewhere) cost 12 bytes more a parameter and keep them.",
            " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
        )


def _adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    return {p for m in model.modules() if isinstance(m, BaseTunerLayer) for p in m.parameters()}


def ascent_part(inputs: Mapping[str, Any], fraction: float, stacked: int = 1) -> tuple[dict[str, Any], float]:
    """Return the first examples of a batch, and their share.

    Args:
        inputs (`Mapping`): A batch; every tensor or list with one entry an example, or `stacked` of them, is cut.
        fraction (`float`): Share of the examples, in (0, 1]; rounded, at least one.
        stacked (`int`, *optional*, defaults to `1`): Sequences of an example. They lie in as many equal parts along
            the first dimension: TRL puts chosen ones above rejected ones.

    Returns:
        `tuple[dict, float]`: The smaller batch and the share it really is.

    Raises:
        ValueError: the batch holds one example (packed and padding-free batches count as one).
    """
    rows = next((v.shape[0] for k, v in inputs.items() if k in ("input_ids", "inputs_embeds", "labels")), 0)
    examples = rows // stacked
    if examples < 2:
        raise ValueError(
            f"ascent='partial' cannot take a part of a batch of {examples} sequence (a packed or padding-free batch "
            "counts as one); use gradient_accumulation_steps > 1 (whole micro-batches are taken then), a larger "
            "per_device_train_batch_size, or ascent='two_pass'."
        )
    taken = max(1, round(fraction * examples))

    def cut(value: Any) -> Any:
        countable = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)
        if not countable or len(value) not in (rows, examples):
            return value
        parts: Any = [value[start : start + taken] for start in range(0, len(value), examples)]
        if len(parts) == 1:
            return parts[0]
        return [x for part in parts for x in part] if isinstance(value, list) else torch.cat(parts)

    return {key: cut(value) for key, value in inputs.items()}, taken / examples


def sequences_an_example(trainer: Any) -> int:
    """Return how many sequences TRL stacks for each example: a chosen and a rejected one, or one."""
    return 2 if isinstance(trainer, DPOTrainer | RewardTrainer) else 1
