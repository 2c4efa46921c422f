"""Prices a trainer's steps in plain LoRA steps: predicted for the log, solved for where it is budgeted."""

from dataclasses import replace
from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from slsam_peft.algorithm.arms import Arms
from slsam_peft.algorithm.step import Step
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost.block import NONE
from slsam_peft.cost.expected import active_names, rule_of
from slsam_peft.cost.model import CostModel


class StepCost:
    """Predicts the cost of each step from its active set and the shapes of its micro-batches.

    Args:
        model (`CostModel`): The model's FLOPs.
        arms (`Arms`): The arms.
        config (`SLSAMConfig`): Settings.

    Attributes:
        shapes (`list[tuple[int, int]]`): Micro-batches of the step in progress; the caller fills it.
        joined (`tuple[int, int]` or `None`): Its only one with the sequences of the next step behind it, where some
            are to ride along.
    """

    def __init__(self, model: CostModel, arms: Arms, config: SLSAMConfig) -> None:
        self.model = model
        self.arms = arms
        self.config = config
        self.shapes: list[tuple[int, int]] = []
        self.joined: tuple[int, int] | None = None

    def __call__(self, step: Step) -> float:
        """Return the cost in plain LoRA steps; the one-off checks of the model are not in it."""
        rule = replace(
            rule_of(self.config, rides=False),
            reused=step.cached,
            uncut=step.uncut,
            recalled=step.perturbation is not None and not step.ascents,
            joined=self.joined if step.riding else None,
            wanted=active_names(self.arms, step.next_mask) if step.riding and step.next_mask is not None else NONE,
        )
        return self.model.ratio(active_names(self.arms, step.mask), self.shapes, rule)


def cost_model_of(trainer: Trainer, arms: Arms, config: SLSAMConfig) -> CostModel | None:
    """Return the cost model of a trainer's steps; `None` where its structure or its loss is not known.

    Args:
        trainer (`Trainer`): Its model and its arguments are read.
        arms (`Arms`): The model's arms.
        config (`SLSAMConfig`): Read: `cost_budget`, which cannot do without a cost model.

    Raises:
        ValueError: `cost_budget` is set and there is no cost model, or no block to cut at.
    """
    # The model's structure is read, where the trainer's steps can be counted.
    args: Any = trainer.args
    trained: Any = trainer.model
    model, reason = None, "only SFTTrainer's steps can be counted."
    if isinstance(trainer, SFTTrainer):
        reentrant = bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False))
        try:
            model = CostModel.from_model(trained, args.gradient_checkpointing, reentrant, arms.blocks or None)
        except ValueError as error:
            reason = str(error)
        if model is not None and any(x.base.trainable for block in model.decoder.blocks for x in block.linears):
            model, reason = (
                None,
                "it counts adapters on frozen weights; here weight matrices of the blocks are trained.",
            )
    # Without a budget, a missing cost model is no error.
    if config.cost_budget is None:
        return model
    if model is None:
        raise ValueError(
            f"cost_budget={config.cost_budget} needs a cost model, and {reason} Leave cost_budget unset and set "
            "active_fraction."
        )
    # A budget is met by cutting steps short, so no arm may lie below the blocks.
    below = [arm.name for arm in arms if arm.depth is None or arm.depth < 0]
    if below:
        raise ValueError(
            f"cost_budget={config.cost_budget} needs a block to cut at, and {below[0]!r} lies below the blocks: its "
            "steps run to the bottom. Do not train embeddings, or leave cost_budget unset and set active_fraction."
        )
    return model
