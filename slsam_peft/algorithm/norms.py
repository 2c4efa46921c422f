"""Takes the norms of gradients, per arm and together, without leaving the device."""

from collections.abc import Callable, Collection, Sequence

import torch

from slsam_peft.algorithm.arms import Arm


class ArmNorms:
    """L2 norms of gradients per arm, without leaving the device.

    Args:
        arms (`Sequence[Arm]`): The arms; norms come in their order.
        summed (callable, *optional*): Returns the squared norms of whole gradients, shape `(P,)`, from those of the
            pieces that this rank has; `None` where it has all.
    """

    def __init__(self, arms: Sequence[Arm], summed: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self._summed = summed
        self._parameters = [p for arm in arms for p in arm.parameters]
        self._arm_index = torch.tensor([i for i, arm in enumerate(arms) for _ in arm.parameters])
        self._count = len(arms)
        self._index_on: dict[torch.device, torch.Tensor] = {}

    def squared(self, gradients: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
        """Return the squared norms, shape `(arms,)`, float64 where a gradient is float64 and float32 otherwise.

        Args:
            gradients (`Sequence[torch.Tensor | None]`): One per parameter, in arm order; `None` counts as 0.
            device (`torch.device`): Where the result lies; norms taken on other devices are brought there.
        """
        tensors = [g for g in gradients if g is not None]
        zero = torch.zeros((), dtype=_exact(tensors), device=device)
        found = iter(norms_of(tensors))
        squares = torch.stack([zero if g is None else next(found).to(device) for g in gradients]).square()
        if self._summed is not None:
            squares = self._summed(squares)
        if device not in self._index_on:
            self._index_on[device] = self._arm_index.to(device)
        return zero.new_zeros(self._count).index_add_(0, self._index_on[device], squares)


def norms_of(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the norm of each tensor, shape `()`, all in float64 where one is and in float32 otherwise."""
    return torch._foreach_norm(list(tensors), 2, dtype=_exact(tensors)) if tensors else ()


def joint_norm(gradients: Collection[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the norm of all gradients together, shape `()`, of such a dtype; 0 where there are none."""
    if not gradients:
        return torch.zeros((), device=device)  # made there: a copy from the host would wait
    return torch.stack([norm.to(device) for norm in norms_of(list(gradients))]).norm()


def _exact(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return what norms are taken in: half precision rounds them to a 256th, or beyond its range."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
