"""Tells what one step did, in numbers for the log, and watches whether the radius survives the arithmetic."""

import logging
import math
from typing import Any, NamedTuple

import torch

from slsam_peft.algorithm.passes import Step

logger = logging.getLogger(__name__)

WATCHED_STEPS = 20
LOW_GAIN = 0.7  # the loss should rise by about rho * |g| or more; measured 0.5 to 0.8 at rho 0.01 in bfloat16
LOST_SHARE = 0.25  # of the watched steps


def entropy(probabilities: torch.Tensor) -> float:
    """Return the entropy, in nats, of the probabilities normalised to sum to 1; log(L) where all are equal."""
    q = probabilities / probabilities.sum()
    return float(torch.special.entr(q).sum())


class StepNumbers(NamedTuple):
    """The numbers of a step that the host decides by, gathered on the device and read there in one copy.

    Args:
        ascent_squared (`torch.Tensor`): Squared norms of the arms' ascent gradients, at the loss's scale; shape
            `(L,)`.
        next_ascent_norm (`torch.Tensor`): Norm of the ascent gradient made for the next step, shape `()`; it need only
            be finite.
        descent_squared (`torch.Tensor`): Squared norm of the descent gradient, shape `()`.
        descent_loss (`torch.Tensor`): Loss at w + e, on what the descent passes saw, shape `()`.
        ascent_loss (`torch.Tensor`): Loss at w, on what the ascent passes saw, shape `()`.
        loss_scale (`torch.Tensor`): Factor on the loss, one element.
    """

    ascent_squared: torch.Tensor
    next_ascent_norm: torch.Tensor
    descent_squared: torch.Tensor
    descent_loss: torch.Tensor
    ascent_loss: torch.Tensor
    loss_scale: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Return all of them in one tensor, which has the device and the dtype of the descent gradient's norm."""
        like = self.descent_squared
        return torch.cat([number.reshape(-1).to(like.device, like.dtype) for number in self])

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> "StepNumbers":
        """Rebuild the record from `packed()`, or from a copy of it."""
        scalars = len(cls._fields) - 1
        return cls(packed[:-scalars], *packed[-scalars:])

    @property
    def finite(self) -> bool:
        """Whether every number is finite; the step is skipped where one is not."""
        return all(bool(torch.isfinite(number).all()) for number in self)

    @property
    def norms(self) -> torch.Tensor:
        """Norms of the arms' ascent gradients without the loss scale, shape `(L,)`."""
        return self.ascent_squared.sqrt() / self.loss_scale


def step_metrics(slsam: Any, step: Step, numbers: StepNumbers) -> dict[str, float]:
    """Return the numbers of one step, by the names they are logged under (after `slsam/`).

    Args:
        slsam (`SLSAM`): Read: its probabilities, its settings, its caches, its cost and how many steps it skipped.
        step (`Step`): The step.
        numbers (`StepNumbers`): Its numbers, on the host.
    """
    # Every step has these numbers.
    norm = float(numbers.norms.square().sum().sqrt())
    metrics = {
        "active_fraction": float(step.mask.double().mean()),
        "grad_norm_ascent": norm,
        "entropy": entropy(slsam.probabilities),
        "lowest_active_block": float(step.lowest_active),
        "skipped": float(slsam.skipped),
    }
    # These are there only where the part they tell of is in use.
    if slsam.horizon is not None:
        metrics["hidden_state_cache_mib"] = slsam.horizon.kept_bytes / 2**20
    if slsam.config.ascent in ("remembered", "ahead"):
        metrics["gradient_memory_mib"] = slsam.memory.bytes / 2**20
    if slsam.cost is not None:
        metrics["cost"] = slsam.cost(step)
    # The rise of the loss is known only where both passes saw the same batch.
    rho = slsam.config.rho
    if slsam.config.ascent == "two_pass" and rho > 0 and numbers.finite:
        rise = float(numbers.descent_loss) - float(numbers.ascent_loss)
        metrics["sharpness"] = rise
        metrics["ascent_gain"] = rise / (rho * norm) if norm > 0 else math.nan
    elif rho > 0:
        metrics["loss_is_at_w_plus_e"] = 1.0
    return metrics


class RadiusWatch:
    """Warns once when the ascent gain scatters below 1: then rounding has drowned the perturbation.

    The gain is (loss at w + e - loss at w) / (rho * |g|): 1 to first order, above 1 where the loss curves upwards.

    Args:
        rho (`float`): Radius, for the message.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.gains: list[float] = []

    def see(self, gain: float) -> None:
        """Take in one step's gain; after the first 20 warn if a quarter of them lie below 0.7."""
        if len(self.gains) >= WATCHED_STEPS or not math.isfinite(gain):
            return
        self.gains.append(gain)
        low = sum(g < LOW_GAIN for g in self.gains)
        if len(self.gains) == WATCHED_STEPS and low >= LOST_SHARE * WATCHED_STEPS:
            logger.warning(
                "rho=%g is lost in rounding: in %d of the first %d steps the loss rose by less than %g of "
                "rho * |g|, so the descent gradient follows noise. Raise rho (0.05 and more survives bfloat16) or "
                "compute in float32.",
                self.rho,
                low,
                WATCHED_STEPS,
                LOW_GAIN,
            )
