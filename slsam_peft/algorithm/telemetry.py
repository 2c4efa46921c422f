"""What one update tells: numbers for the log, and a watch on whether the radius survives the arithmetic."""

import logging
import math

import torch

logger = logging.getLogger(__name__)

WATCHED_STEPS = 20
LOW_GAIN = 0.7  # the loss should rise by about rho * |g| or more; measured 0.5 to 0.8 at rho 0.01 in bfloat16
LOST_SHARE = 0.25  # of the watched updates


def entropy(probabilities: torch.Tensor) -> float:
    """Return the entropy, in nats, of the probabilities normalised to sum to 1; log(L) where all are equal."""
    q = probabilities / probabilities.sum()
    return float(torch.special.entr(q).sum())


def step_metrics(slsam, step, norms: torch.Tensor, ascent: float, descent: float, finite: bool) -> dict[str, float]:
    """Return the numbers of one update, by the names they are logged under (after `slsam/`).

    Args:
        slsam (`SLSAM`): Read: its probabilities, cost and counters.
        step (`Step`): The step.
        norms (`torch.Tensor`): Norms the bandit saw, shape `(L,)`.
        ascent (`float`): Loss at w (on what the ascent pass saw).
        descent (`float`): Loss at w + e (on what the descent pass saw).
        finite (`bool`): Whether the update counted.
    """
    norm = float(norms.square().sum().sqrt())
    metrics = {
        "active_fraction": float(step.mask.double().mean()),
        "grad_norm_ascent": norm,
        "entropy": entropy(slsam.probabilities),
        "lowest_active_block": float(step.lowest_active),
        "skipped": float(slsam.skipped),
    }
    if slsam.horizon is not None:
        metrics["hidden_state_cache_mib"] = slsam.horizon.kept_bytes / 2**20
    if slsam.config.ascent in ("remembered", "ahead"):
        metrics["gradient_memory_mib"] = slsam.memory.bytes / 2**20
    if slsam.cost is not None:
        metrics["cost"] = slsam.cost(step)
    rho = slsam.config.rho
    if slsam.config.ascent == "two_pass" and rho > 0 and finite:
        metrics["sharpness"] = descent - ascent
        metrics["ascent_gain"] = (descent - ascent) / (rho * norm) if norm > 0 else math.nan
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
        """Take in one update's gain; after the first 20 warn if a quarter of them lie below 0.7."""
        if len(self.gains) >= WATCHED_STEPS or not math.isfinite(gain):
            return
        self.gains.append(gain)
        low = sum(g < LOW_GAIN for g in self.gains)
        if len(self.gains) == WATCHED_STEPS and low >= LOST_SHARE * WATCHED_STEPS:
            logger.warning(
                "rho=%g is lost in rounding: in %d of the first %d updates the loss rose by less than %g of "
                "rho * |g|, so the descent gradient follows noise. Raise rho (0.05 and more survives bfloat16) or "
                "compute in float32.",
                self.rho,
                low,
                WATCHED_STEPS,
                LOW_GAIN,
            )
