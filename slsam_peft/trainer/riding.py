"""Finds out whether sequences of the next batch may ride along in a pass, and the pairs of factors they need."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from trl import SFTTrainer

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.stack import Pair
from slsam_peft.trainer.factors import plain_pairs
from slsam_peft.trainer.sharded import is_fsdp2


def lora_pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of LoRA factors of a model that can run with two weights: linear ones that are trained.

    Args:
        model (`nn.Module`): The model, adapters attached.
    """
    return [pair for module in model.modules() if isinstance(module, LoraLayer) for _, pair in plain_pairs(module)]


def not_pairs(arms: Sequence[Arm], pairs: Sequence[Pair]) -> str:
    """Return why sequences cannot ride along in passes of what is trained, where the trainer would let them.

    Args:
        arms (`Sequence[Arm]`): What is trained.
        pairs (`Sequence[Pair]`): What `lora_pairs` found.

    Returns:
        `str`: A clause without a full stop.
    """
    known = {id(weight) for pair in pairs for weight in pair.weights}
    trained = ((n, p) for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True))
    others = [name for name, parameter in trained if id(parameter) not in known]
    if not others:
        return "the arms that are not drawn are not trained (descent='active')"
    return f"only plain pairs of LoRA factors can run with two weights, and {others[0]} is none"


def has_own_loss(trainer: Any) -> bool:
    """Whether a trainer's loss is TRL's own for supervised fine-tuning: a sum over tokens by `num_items_in_batch`.

    Where `compute_loss` is overridden it may be another one; the first pass in which sequences ride shows that.
    """
    return (
        isinstance(trainer, SFTTrainer)
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
        and trainer.model_accepts_loss_kwargs
    )


def overrides_loss(trainer: Any) -> bool:
    """Whether a trainer has a `compute_loss` that is not TRL's for supervised fine-tuning."""
    return "compute_loss" in vars(trainer) or type(trainer).compute_loss is not SFTTrainer.compute_loss


def _rope_that_looks_at_the_length(config: Any) -> str | None:
    """Return the kind of rotary positions that a model scales by the longest sequence of a batch; `None`: none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [settings, *settings.values()] if isinstance(settings, dict) else []  # of each kind of layer, in some
    found = (kind.get("rope_type", kind.get("type")) for kind in kinds if isinstance(kind, dict))
    return next((rope for rope in found if rope in ("longrope", "dynamic")), None)


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
            "sequences of the first micro-batch make the ascent"
        )
    if is_fsdp2(trainer):
        return "parameters are sharded (FSDP2), and pieces cannot stand side by side"
    if trainer.label_smoother is not None:
        return "it needs TRL's own loss, and label smoothing makes another one"
    if not has_own_loss(trainer):
        return "it needs TRL's own loss, normalised by num_items_in_batch, and here is another one"
    if args.neftune_noise_alpha:
        return "NEFTune's noise depends on the length of a batch, which riding sequences change"
    if rope := _rope_that_looks_at_the_length(model.config):
        return f"positions of rope_type={rope!r} depend on the length of a batch, which riding sequences change"
    if trainer.aux_loss_enabled:
        return "the router's auxiliary loss of a mixture of experts is over all sequences of a batch"
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return "LLM.int8 picks outlier columns over all sequences of a batch"
    return None
