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

    def recall(self, members: Sequence[int]) -> tuple[list[int], list[torch.Tensor], torch.Tensor | None]:
        """Return which of the given positions have a gradient here, the gradients, and their norm, shape `()`."""
        known = [i for i in members if i in self.gradients]
        if not known:
            return [], [], None
        gradients = [self.gradients[i].to(self.parameters[i].dtype) for i in known]
        norms = torch._foreach_norm(gradients)
        return known, gradients, torch.stack([n.to(norms[0].device) for n in norms]).norm()

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
    return {i: g.to(torch.bfloat16, copy=True) for i, g in gradients.items()}
