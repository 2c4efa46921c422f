"""Tells from a model's structure, before anything runs, what of training will run otherwise than meant."""

from typing import Any

from slsam_peft.algorithm.arms import Arms
from slsam_peft.algorithm.fallbacks import Fallback
from slsam_peft.algorithm.horizon import CACHE_OFF, RUN_TWICE
from slsam_peft.algorithm.passes import NOT_RIDING, SMALL_PASS


def has_router_losses(model: Any) -> bool:
    """Return whether TRL's loss has a part of every router of a mixture of experts.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; the configuration alone is read.
    """
    config = model.config.get_text_config()
    return hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0.0


def foreseen(model: Any, arms: Arms, *, looks_ahead: bool, micro_batches: int) -> list[Fallback]:
    """Return what training with `SLSAMTrainer` will fall back to, as far as the structure shows it.

    What shows in the passes alone is told in training: blocks that run on their own output, features that are taken
    from the middle of a stack, batches that cannot be cut.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, on the meta device or not, adapters attached.
        arms (`Arms`): Its arms.
        looks_ahead (`bool`): Whether sequences of the next batch are wanted in a step's pass.
        micro_batches (`int`): Micro-batches of a step.
    """
    found = []
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", None) or 0
    routed = has_router_losses(model)
    if not arms.layout.stacks:
        why = "the model has no stack of blocks that hold something trained"
        found.append(Fallback("passes are not cut", why, "Every pass runs whole: two of them cost 2 plain ones."))
    elif routed:
        found.append(Fallback(CACHE_OFF, "the loss has a part of every block's router", RUN_TWICE))
    elif shared:
        first = len(arms.layout.stacks[-1]) - shared
        why = f"the blocks from {first} on attend to keys and values that blocks below {first} have made"
        found.append(Fallback(f"{CACHE_OFF} between those blocks", why, RUN_TWICE))
    if looks_ahead and micro_batches > 1:
        why = f"it needs one micro-batch per step, and a step has {micro_batches}"
        found.append(Fallback(NOT_RIDING, why, SMALL_PASS))
    elif looks_ahead and routed:
        why = "the router's auxiliary loss of a mixture of experts is over all sequences of a batch"
        found.append(Fallback(NOT_RIDING, why, SMALL_PASS))
    return found
