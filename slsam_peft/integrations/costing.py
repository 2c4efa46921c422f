"""The price of an update in plain LoRA updates: predicted for the log, solved for where a budget is set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from slsam_peft.arms import Arms
from slsam_peft.budget import independent_reach, reach_of, solve_active_fraction
from slsam_peft.config import SLSAMConfig
from slsam_peft.cost import CostModel, Rule
from slsam_peft.passes import Update
from slsam_peft.sampling import build_design

if TYPE_CHECKING:
    from slsam_peft.integrations.trainer import SLSAMMixin

Shapes = Sequence[tuple[int, int]]

SAMPLED_DRAWS = 512  # to estimate a design's floors where no formula is at hand


def rule_of(config: SLSAMConfig, kept: int | None = None) -> Rule:
    """Return how the cost model sees `config`.

    Args:
        config (`SLSAMConfig`): Settings.
        kept (`int`, *optional*): Micro-batches whose second pass starts at the floor. Defaults to all that can.
    """
    return Rule(
        ascent=config.ascent,
        ascent_fraction=config.ascent_fraction,
        descent=config.descent,
        perturbed=config.rho > 0,
        reused=kept,
    )


def cost_model_of(trainer: "SLSAMMixin", arms: Arms) -> CostModel | None:
    """Return the cost model of a trainer's updates; `None` where its structure or its loss is not known.

    Raises:
        ValueError: `cost_budget` is set and there is no cost model.
    """
    reason = "only SFTTrainer's updates can be counted"
    if hasattr(trainer, "maybe_activation_offload_context"):
        args = trainer.args
        reentrant = bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False))
        try:
            return CostModel.from_model(trainer.model, args.gradient_checkpointing, reentrant, arms.blocks or None)
        except ValueError as error:
            reason = str(error)
    if trainer.slsam_config.cost_budget is not None:
        raise ValueError(
            f"cost_budget={trainer.slsam_config.cost_budget} needs a cost model, and {reason} Leave cost_budget unset "
            "and set active_fraction."
        )
    return None


def shape_of(inputs: Any) -> tuple[int, int]:
    """Return `(batch, length)` of a micro-batch."""
    rows, length = inputs["input_ids"].shape[:2]
    return int(rows), int(length)


class UpdateCost:
    """Predicts the cost of each update from its active set and the shapes of its micro-batches.

    Args:
        model (`CostModel`): The model's FLOPs.
        arms (`Arms`): The arms.
        config (`SLSAMConfig`): Settings.

    Attributes:
        shapes (`list[tuple[int, int]]`): Micro-batches of the update in progress; the caller fills it.
    """

    def __init__(self, model: CostModel, arms: Arms, config: SLSAMConfig) -> None:
        self.model = model
        self.arms = arms
        self.config = config
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, update: Update) -> float:
        """Return the cost in plain LoRA updates; the one-off check of prefix reuse is not in it."""
        names = [n for arm, on in zip(self.arms, update.mask.tolist(), strict=True) if on for n in arm.parameter_names]
        return self.model.ratio(names, self.shapes, rule_of(self.config, update.kept))


def solve_fraction(model: CostModel, arms: Arms, config: SLSAMConfig, shapes: Shapes) -> float:
    """Return the expected share of active arms at which an update costs `config.cost_budget` on average.

    Args:
        model (`CostModel`): The model's FLOPs.
        arms (`Arms`): The arms, with a depth each.
        config (`SLSAMConfig`): Settings, with `cost_budget` set.
        shapes (`Sequence[tuple[int, int]]`): `(batch, length)` of the micro-batches of a typical update.

    Raises:
        ValueError: the budget is below the least, or above the most, that the settings can reach, or arms lie outside
            the blocks at the bottom, where no floor can cut.
    """
    below = [arm.name for arm in arms if arm.depth is None or arm.depth < 0]
    if below and config.descent == "active":
        raise ValueError(
            f"cost_budget={config.cost_budget} needs a floor to cut at, and {below[0]!r} lies below the blocks: its "
            "updates run to the bottom. Do not train embeddings, or leave cost_budget unset and set active_fraction."
        )
    terms = model.linear_terms(shapes, rule_of(config))
    count, blocks = len(arms), len(model)

    def expected(fraction: float) -> float:
        return terms.expected(*_reach(config, arms, torch.full((count,), fraction, dtype=torch.float64), blocks))

    return solve_active_fraction(expected, config.cost_budget or 0.0, least=1.0 / count)


def _reach(
    config: SLSAMConfig, arms: Arms, probabilities: torch.Tensor, blocks: int
) -> tuple[list[float], list[float]]:
    """Return `(P(floor <= l), P(block l is active))` of the design, for every block l."""
    design = build_design(config, [arm.depth for arm in arms])
    depths = torch.tensor([arm.depth for arm in arms]).clamp(max=blocks)
    if config.design == "depth":
        inclusion = torch.zeros(blocks + 1, dtype=torch.float64)
        inclusion.scatter_reduce_(0, depths, design.inclusion(probabilities), "amax")
        reach = inclusion.cummax(0).values[:blocks].tolist()
        return reach, reach
    if config.design == "bernoulli" and len(arms) == blocks and bool((depths == torch.arange(blocks)).all()):
        return independent_reach(probabilities.tolist())
    generator = torch.Generator().manual_seed(config.seed)
    draws = []
    for _ in range(SAMPLED_DRAWS):
        on = torch.zeros(blocks, dtype=torch.bool)
        on[depths[design(probabilities, generator)].clamp(max=blocks - 1)] = True
        draws.append(on.tolist())
    return reach_of(draws)
