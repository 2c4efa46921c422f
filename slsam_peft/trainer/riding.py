"""Finds out whether sequences of the next batch may ride along in a pass, and the pairs of factors they need."""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from trl import SFTTrainer

from slsam_peft.algorithm.stack import Pair
from slsam_peft.trainer.sharded import is_fsdp2


def lora_pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of LoRA factors of a model that can run with two weights: linear ones that are trained.

    Args:
        model (`nn.Module`): The model, adapters attached.
    """
    return [pair for module in model.modules() if isinstance(module, LoraLayer) for pair in _pairs_of(module)]


def _pairs_of(layer: Any) -> Iterator[Pair]:
    for name, down in layer.lora_A.items():
        up: Any = layer.lora_B[name] if name in layer.lora_B else None
        varied = layer.use_dora.get(name, False) or name in getattr(layer, "lora_variant", {})
        if varied or not (_is_plain(down) and _is_plain(up)):
            continue
        if down.weight.requires_grad and up.weight.requires_grad and down.bias is None and up.bias is None:
            yield Pair(down, up)


def _is_plain(module: Any) -> bool:
    """Whether a module is a linear one as torch has it; hooks of accelerate, for one, replace its `forward`."""
    return type(module) is nn.Linear and "forward" not in vars(module)


def why_not(trainer: Any) -> str | None:
    """Return why no sequence may ride along in a trainer's passes; `None` where they may.

    Args:
        trainer (`Trainer`): A transformers or TRL trainer.

    Returns:
        `str` or `None`: A clause without a full stop.
    """
    args: Any = trainer.args
    model: Any = trainer.model
    if not isinstance(trainer, SFTTrainer):
        return f"it joins batches of texts, and {type(trainer).__name__} makes others"
    if args.gradient_accumulation_steps > 1:
        return (
            f"it needs one micro-batch per step, and gradient_accumulation_steps={args.gradient_accumulation_steps}: "
            "one of the micro-batches makes the ascent, at the same count"
        )
    if is_fsdp2(trainer):
        return "parameters are sharded (FSDP2), and pieces cannot stand side by side"
    if trainer.compute_loss_func is not None or not trainer.model_accepts_loss_kwargs:
        return "it needs TRL's own loss, normalised by num_items_in_batch, and here is another one"
    if trainer.label_smoother is not None:
        return "it needs TRL's own loss, and label smoothing makes another one"
    if trainer.aux_loss_enabled:
        return "the router's auxiliary loss of a mixture of experts is over all sequences of a batch"
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return "LLM.int8 picks outlier columns over all sequences of a batch"
    return None
