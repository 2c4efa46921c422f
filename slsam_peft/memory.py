"""Descent gradients remembered for the next update: the ascent of S2-SAM (NeurIPS 2024), without a second pass."""

from collections.abc import Sequence

import torch
from torch import nn


class GradientMemory:
    """The last descent gradient of each parameter, in bfloat16 and without the loss scale.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: dict[int, torch.Tensor] = {}

    def store(self, members: Sequence[int], scale: torch.Tensor | None = None) -> None:
        """Keep the present gradients of the parameters at the given positions; all of them or, on an error, none.

        Args:
            members (`Sequence[int]`): The positions.
            scale (`torch.Tensor`, *optional*): Factor on the loss, one element, not read by the host; it is divided
                out, since gradients of updates with different factors make one e.
        """
        gradients = [(i, g) for i in members if (g := self.parameters[i].grad) is not None]
        if scale is not None:
            scale = scale.reshape(())
            gradients = [
                (i, g.to(torch.promote_types(g.dtype, torch.float32)) / scale.to(g.device)) for i, g in gradients
            ]
        self.gradients |= {i: g.to(torch.bfloat16, copy=True) for i, g in gradients}

    def recall(self, members: Sequence[int]) -> tuple[list[int], list[torch.Tensor], torch.Tensor | None]:
        """Return which of the given positions are remembered, their gradients, and the joint norm, shape `()`."""
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
                raise ValueError(
                    f"the remembered gradient of {name!r}, shape {tuple(gradient.shape)}, fits no parameter."
                )
        self.gradients = {positions[n]: g.to(self.parameters[positions[n]].device) for n, g in state.items()}
