"""Tells from a model's structure, before anything runs, what of training will run otherwise than meant."""

from typing import Any

from torch import nn

from slsam_peft.algorithm.arms import Arms
from slsam_peft.algorithm.blocks import block_stacks
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


def counts_in_part(model: nn.Module, counted: str) -> Fallback | None:
    """Return that costs are an estimate, where a model has more stacks of blocks than the one that is counted.

    How many tokens the others see is known to the batches alone: patches of images, frames, what an encoder reads.

    Args:
        model (`nn.Module`): The model.
        counted (`str`): Name of the first block of the stack that is counted.
    """
    stack = counted.rpartition(".")[0]
    others = [name for name, _ in block_stacks(model) if name != stack]
    if not others:
        return None
    return Fallback(
        "costs are an estimate",
        f"slsam/cost, cost_budget and plans count the blocks of {stack} alone, and the model has {', '.join(others)} "
        "beside them, whose tokens are not known beforehand",
        "What the others cost is in neither the step's cost nor the plain step's.",
    )


def plans_in_part(config: Any) -> Fallback | None:
    """Return that a plan is of the language model alone, where a configuration describes more.

    Args:
        config (`PreTrainedConfig`): The configuration as it is, not its text part.
    """
    text = config.get_text_config()
    others = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) not in (None, text)]
    if config.is_encoder_decoder:
        others.append("an encoder")
    if text is config and not config.is_encoder_decoder or not others:
        return None
    return Fallback(
        "costs are an estimate",
        f"the plan is of the causal language model alone, and the configuration has {', '.join(others)} beside it",
        "What the others cost, and what memory they take, is not in it.",
    )


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
