"""Knows the parameters of all arms by position: whose they are, which are thawed, and their gradients."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from slsam_peft.algorithm.shards import local


class ArmParameters:
    """The parameters of all arms.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
        owner (`torch.Tensor`): Arm index of each, shape `(P,)`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], owner: torch.Tensor) -> None:
        self.parameters = parameters
        self.owner = owner
        self._arm_of: list[int] = owner.tolist()
        self._members: dict[int, list[int]] = {arm: [] for arm in self._arm_of}
        for i, arm in enumerate(self._arm_of):
            self._members[arm].append(i)

    def members(self, arms: torch.Tensor) -> list[int]:
        """Return the positions of the parameters of the arms in a mask, shape `(L,)`."""
        on = arms.tolist()
        return [i for i, arm in enumerate(self._arm_of) if on[arm]]

    def members_of(self, arm: int) -> list[int]:
        """Return the positions of the parameters of one arm."""
        return self._members[arm]

    def thawed(self) -> torch.Tensor:
        """Return which arms have a parameter that requires a gradient, boolean, shape `(L,)`.

        Callbacks and users freeze parameters in the middle of training; those are left alone.
        """
        on = {arm for arm, p in zip(self._arm_of, self.parameters, strict=True) if p.requires_grad}
        return torch.tensor([arm in on for arm in range(max(self._arm_of) + 1)])

    def clear(self, arms: torch.Tensor | None = None) -> None:
        """Drop the gradients of the given arms, or of all."""
        for i in range(len(self.parameters)) if arms is None else self.members(arms):
            self.parameters[i].grad = None

    def has_gradient(self, arms: torch.Tensor) -> bool:
        """Return whether a parameter of the arms in a mask has a gradient."""
        return any(self.parameters[i].grad is not None for i in self.members(arms))

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradient of each parameter, of a sharded one this rank's piece; `None` where there is none."""
        return [local(p.grad) for p in self.parameters]

    def device_of(self, gradients: Sequence[torch.Tensor | None]) -> torch.device:
        """Return where the first gradient lies, or the first parameter where there is none."""
        return next((g.device for g in gradients if g is not None), self.parameters[0].device)

    def void(self) -> None:
        """Make one gradient NaN, for whoever must see for itself that a step is void."""
        found = next((p.grad for p in self.parameters if p.grad is not None), None)
        if found is not None:
            found.fill_(math.nan)
        else:
            self.parameters[0].grad = torch.full_like(self.parameters[0], math.nan)
