"""Tells what one step did, in numbers for the log, and watches whether the radius survives the arithmetic."""

import logging
import math
from typing import Any, NamedTuple

import torch

from slsam_peft.algorithm.step import Step

logger = logging.getLogger(__name__)

WATCHED_STEPS = 20
LOW_GAIN = 0.3  # of the rise that was asked for; measured 0.5 to 0.8 at a length of 0.01 in bfloat16
LOST_SHARE = 0.5  # of the watched steps


def entropy(probabilities: torch.Tensor) -> float:
    """Return the entropy, in nats, of the probabilities normalised to sum to 1; log(L) where all are equal."""
    values = probabilities.tolist()
    total = math.fsum(values)
    return -math.fsum(p / total * math.log(p / total) for p in values if p > 0)


class StepNumbers(NamedTuple):
    """The numbers of a step that the host decides by, gathered on the device and read there in one copy.

    Args:
        ascent_squared (`torch.Tensor`): Squared norms of the arms' ascent gradients, of the ascent sequences' mean
            loss; shape `(L,)`.
        descent_squared (`torch.Tensor`): Squared norms of the arms' descent gradients, at the loss's scale; shape
            `(L,)`.
        riding_norm (`torch.Tensor`): Norm of the ascent gradient made for the next step, shape `()`; it need only be
            finite.
        rho (`torch.Tensor`): Length of e, as the radius measures it, shape `()`; of a rule without an e how strong it
            is in this step; NaN where there is neither.
        slope (`torch.Tensor`): What e raises the ascent sequences' mean loss by, to first order, shape `()`; NaN where
            it is rho times the gradient's norm.
        seen_loss (`torch.Tensor`): Mean loss of the ascent's sequences at w + e, shape `()`; NaN where not known.
        part_loss (`torch.Tensor`): The same at w, or where their gradient was taken: `Sampa` runs them elsewhere.
        descent_loss (`torch.Tensor`): Loss at w + e, on what the descent passes saw, shape `()`.
        ascent_loss (`torch.Tensor`): Loss at w, on what the ascent passes saw, shape `()`.
        loss_scale (`torch.Tensor`): Factor on the loss, one element.
    """

    ascent_squared: torch.Tensor
    descent_squared: torch.Tensor
    riding_norm: torch.Tensor
    rho: torch.Tensor
    slope: torch.Tensor
    seen_loss: torch.Tensor
    part_loss: torch.Tensor
    descent_loss: torch.Tensor
    ascent_loss: torch.Tensor
    loss_scale: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Return all of them in one tensor, which has the device and the dtype of the descent gradient's norms."""
        like = self.descent_squared
        return torch.cat([number.reshape(-1).to(like.device, like.dtype) for number in self])

    @classmethod
    def unpacked(cls, packed: torch.Tensor, arms: int) -> "StepNumbers":
        """Rebuild the record from `packed()`, or from a copy of it."""
        return cls(packed[:arms], packed[arms : 2 * arms], *packed[2 * arms :])

    @property
    def finite(self) -> bool:
        """Whether every number that a step rests on is finite; the step is skipped where one is not."""
        decisive = (*self[:3], self.descent_loss, self.ascent_loss)
        return all(math.isfinite(x) for number in decisive for x in number.reshape(-1).tolist())

    @property
    def ascent_norms(self) -> torch.Tensor:
        """Norms of the arms' ascent gradients, shape `(L,)`."""
        return self.ascent_squared.sqrt()

    @property
    def descent_norms(self) -> torch.Tensor:
        """Norms of the arms' descent gradients without the loss scale, shape `(L,)`."""
        return self.descent_squared.sqrt() / self.loss_scale


def step_metrics(slsam: Any, step: Step, numbers: StepNumbers) -> dict[str, float]:
    """Return the numbers of one step, by the names they are logged under (after `slsam/`).

    Args:
        slsam (`SLSAM`): Read: its probabilities, its settings, its caches, its cost and how many steps it skipped.
        step (`Step`): The step.
        numbers (`StepNumbers`): Its numbers, on the host.
    """
    # Every step has these numbers.
    norm, mask = math.sqrt(math.fsum(numbers.ascent_squared.tolist())), step.mask.tolist()
    metrics = {
        "active_fraction": sum(mask) / len(mask),
        "grad_norm_ascent": norm,
        "entropy": entropy(slsam.probabilities),
        "lowest_active_block": float(step.lowest_active),
        "skipped": float(slsam.skipped),
    }
    # These are there only where the part they tell of is in use.
    if slsam.horizon is not None:
        metrics["hidden_state_cache_mib"] = slsam.horizon.kept_bytes / 2**20
    if slsam.ascent.stale:
        metrics["gradient_memory_mib"] = slsam.memory.bytes / 2**20
    if slsam.cost is not None:
        metrics["cost"] = slsam.cost(step)
    return metrics | _perturbed_metrics(slsam, step, numbers, norm)


def _perturbed_metrics(slsam: Any, step: Step, numbers: StepNumbers, norm: float) -> dict[str, float]:
    """Return how far the step was perturbed, and how much the loss rose by it."""
    if not slsam.config.is_perturbed:
        return {}
    metrics = {} if slsam.ascent.exact or not slsam.ascent.moves else {"loss_is_at_w_plus_e": 1.0}
    rho, rise = float(numbers.rho), float(numbers.seen_loss) - float(numbers.part_loss)
    if step.perturbation is None:  # the ascent moves the passes in its own way, or not at all
        return metrics if math.isnan(rho) else metrics | {"rho": rho}
    metrics["rho"] = rho
    if slsam.ascent.exact and numbers.finite:
        metrics["sharpness"] = float(numbers.descent_loss) - float(numbers.ascent_loss)
    elif math.isfinite(rise):
        metrics |= {"ascent_loss": float(numbers.part_loss), "loss_rise": rise}
    rise = metrics.get("sharpness", rise)
    if math.isfinite(rise):
        expected = rho * norm if math.isnan(float(numbers.slope)) else float(numbers.slope)
        metrics["ascent_gain"] = rise / expected if expected > 0 else math.nan
    return metrics


class RadiusWatch:
    """Warns once where the loss does not rise as it should: then rounding has drowned the perturbation.

    The gain is (loss at w + e - loss at w) / (rho * |g|), on the sequences that the ascent was made of: 1 to first
    order, above 1 where the loss curves upwards.
    """

    def __init__(self) -> None:
        self.gains: list[float] = []

    def see(self, metrics: dict[str, float], *, stale: bool = False) -> None:
        """Take in one step's metrics; after the first 20 gains warn if half of them lie below 0.3.

        Args:
            metrics (`dict[str, float]`): From `step_metrics`.
            stale (`bool`, *optional*, defaults to `False`): Whether the loss at w is one step old: what that step has
                learnt is in the gain then, and only one below 0 counts as low.
        """
        gain = metrics.get("ascent_gain", math.nan)
        if len(self.gains) >= WATCHED_STEPS or not math.isfinite(gain):
            return
        self.gains.append(gain if not stale else math.copysign(1.0, gain))
        low = sum(g < LOW_GAIN for g in self.gains)
        if len(self.gains) == WATCHED_STEPS and low >= LOST_SHARE * WATCHED_STEPS:
            logger.warning(
                "the perturbation (length %.3g in the last step) is lost: in %d of the first %d steps the loss %s, so "
                "the descent gradient follows noise. Raise loss_rise or rho (a length of 0.05 and more survives "
                "bfloat16), or compute in float32.",
                metrics["rho"],
                low,
                WATCHED_STEPS,
                "fell" if stale else f"rose by less than {LOW_GAIN:g} of what was asked for",
            )
