"""Radii of a user that keep something from step to step."""

import torch

from slsam_peft.algorithm.radius import Offsets

SHARE = 0.2  # of a new norm in the mean


class Saved:
    """As long as the mean of the norms that it has seen, one tensor that it writes into; it reads no state.

    Args:
        most (`float`, *optional*, defaults to `0.3`): The longest that it is.
    """

    def __init__(self, most=0.3):
        self.most = most
        self.mean = torch.zeros((), dtype=torch.float64)

    def offsets(self, gradients, weights, norm, unit):
        self.mean.lerp_((norm * unit).double(), SHARE)
        rho = self.mean.clamp(max=self.most).to(norm.dtype)
        return Offsets([g * (rho / (norm + 1e-12)) for g in gradients], rho)

    def state_dict(self):
        return {"mean": self.mean}


class Following(Saved):
    """The same, and what it keeps can be put back."""

    def load_state_dict(self, state):
        self.mean.copy_(state["mean"])
