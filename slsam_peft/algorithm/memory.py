"""Keeps gradients for the next step, whose ascent needs no second pass then.

They are descent gradients, as in S2-SAM (NeurIPS 2024), or look-ahead ascent gradients.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


class GradientMemory:
    """The last gradient of each parameter, in bfloat16 and without the loss scale.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: dict[int, torch.Tensor] = {}

    def store(self, gradients: Mapping[int, torch.Tensor], scale: torch.Tensor | None = None) -> None:
        """Keep gradients beside those of other parameters; all of them or, on an error, none.

        Args:
            gradients (`Mapping[int, torch.Tensor]`): By the position of their parameter.
            scale (`torch.Tensor`, *optional*): Factor on the loss, one element, not read by the host; it is divided
                out, since gradients of steps with different factors make one e.
        """
        self.gradients = self.gradients | _kept(gradients, scale)

    def replace(self, gradients: Mapping[int, torch.Tensor], scale: torch.Tensor | None = None) -> None:
        """Keep gradients, as `store` does, and forget all others."""
        self.gradients = _kept(gradients, scale)

    def recall(self, members: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the gradients of those of the given positions that have one here, in their parameters' dtype."""
        known = [i for i in members if i in self.gradients]
        gradients = [torch.empty_like(self.parameters[i], requires_grad=False) for i in known]
        if known:
            torch._foreach_copy_(gradients, [self.gradients[i] for i in known])
        return dict(zip(known, gradients, strict=True))

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return sum(g.numel() * g.element_size() for g in self.gradients.values())

    def state_dict(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the gradients by parameter name."""
        return {names[i]: g.clone() for i, g in self.gradients.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], names: Sequence[str]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a gradient fits no parameter.
        """
        positions = {name: i for i, name in enumerate(names)}
        for name, gradient in state.items():
            if name not in positions or gradient.shape != self.parameters[positions[name]].shape:
                raise ValueError(f"the stale gradient of {name!r}, shape {tuple(gradient.shape)}, fits no parameter.")
        self.gradients = {positions[n]: g.to(self.parameters[positions[n]].device) for n, g in state.items()}


def _kept(gradients: Mapping[int, torch.Tensor], scale: torch.Tensor | None) -> dict[int, torch.Tensor]:
    if scale is not None:
        scale = scale.reshape(())
        gradients = {
            i: g.to(torch.promote_types(g.dtype, torch.float32)) / scale.to(g.device) for i, g in gradients.items()
        }
    kept = {
        i: torch.empty_like(g, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        for i, g in gradients.items()
    }
    if kept:
        torch._foreach_copy_(list(kept.values()), list(gradients.values()))
    return kept
