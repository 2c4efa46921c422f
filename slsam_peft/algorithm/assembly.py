"""Settles what SL-SAM's settings leave to the model: the expected share of arms, what may ride along, the runner."""

from collections.abc import Sequence

import torch
from torch import nn

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.horizons import Horizons
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.shards import Shards
from slsam_peft.algorithm.stack import Pair
from slsam_peft.config import SLSAMConfig
from slsam_peft.presets import RIDING


def fraction_of(config: SLSAMConfig, count: int, solved: float | None = None) -> float:
    """Return the expected share of active arms.

    Args:
        config (`SLSAMConfig`): Resolved settings.
        count (`int`): Number of arms.
        solved (`float`, *optional*): The share that meets `config.cost_budget`.

    Raises:
        ValueError: a `cost_budget` that nobody has solved; less than one arm, asked for without a method.
    """
    if solved is not None:
        return solved
    if config.cost_budget is not None:
        raise ValueError(
            f"cost_budget={config.cost_budget} needs a cost model of the whole model; use SLSAMTrainer, or solve "
            "for the fraction (slsam_peft.cost.expected.ExpectedCost.solve) and pass SLSAM(..., fraction=...)."
        )
    if config.active_fraction is None or config.method is not None:
        return config.fraction if config.bandit == "paper" else max(config.fraction, 1.0 / count)
    if config.active_fraction * count < 1 - 1e-9 and config.bandit != "paper":
        raise ValueError(
            f"active_fraction={config.active_fraction} of {count} arms is less than one arm; use at least "
            f"{1 / count:.3g}, or a finer granularity."
        )
    return config.active_fraction


def riding_pairs(
    config: SLSAMConfig, pairs: Sequence[Pair], parameters: Sequence[nn.Parameter], shards: Shards | None
) -> Sequence[Pair]:
    """Return the pairs in whose passes sequences of the next step may ride along; none where that would be wrong.

    Args:
        config (`SLSAMConfig`): Resolved settings.
        pairs (`Sequence[Pair]`): The model's low-rank pairs.
        parameters (`Sequence[nn.Parameter]`): All arms' parameters.
        shards (`Shards`, *optional*): The sharded ones among them.

    Raises:
        ValueError: the ascent needs them by name, and they do not hold all parameters, or these are sharded.
    """
    all_held = bool(pairs) and {w for pair in pairs for w in pair.weights} == set(parameters) and shards is None
    if config.ascent in RIDING and config.is_perturbed and not all_held:
        raise ValueError(
            f"ascent={config.ascent!r} runs sequences at w and at w + e in one pass, which only pairs of LoRA "
            "factors can that hold everything that is trained and are not sharded; use ascent='auto' or "
            "'partial', or train LoRA factors only."
        )
    # What rides along is seen by every arm that the next step perturbs only where all of them are trained.
    return pairs if all_held and (config.descent == "all" or config.active_fraction == 1) else ()


def build_runner(
    arms: Sequence[Arm],
    horizon: Horizons | None,
    fallbacks: Fallbacks,
    pairs: Sequence[Pair],
    shards: Shards | None,
) -> PassRunner:
    """Return what runs the passes.

    Args:
        arms (`Sequence[Arm]`): The arms; `Arms` bring what a second pass must find as the first one did.
        horizon (`Horizons`, *optional*): Cuts the passes.
        fallbacks (`Fallbacks`): Told of what runs otherwise than meant.
        pairs (`Sequence[Pair]`): Where sequences of the next step ride along.
        shards (`Shards`, *optional*): The sharded ones among the parameters.
    """
    return PassRunner(
        [p for arm in arms for p in arm.parameters],
        torch.tensor([i for i, arm in enumerate(arms) for _ in arm.parameters]),
        {p: sites for arm in arms for p, sites in zip(arm.parameters, arm.sites, strict=True)},
        horizon,
        fallbacks,
        pairs,
        getattr(arms, "buffered", None),
        shards,
        getattr(arms, "devices", ()),
    )
