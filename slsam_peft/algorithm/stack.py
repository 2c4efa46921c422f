r"""Runs some tokens of a batch at w + e and the others at w, in one pass.

A LoRA pair computes $B A x$. Here $A$ becomes $[A + e_A;\, A]$ of twice the rank and $B$ becomes $[B + e_B,\, B]$, and
of the hidden $h = A x$, twice as wide, each token keeps one half: this step's own tokens the first, those that ride
along for the next step's ascent the second. x is read once, and a pair costs three thin operations instead of two.
Both halves are in the graph of the parameters: own tokens alone make the gradient that arrives at w, hooks and all;
what riding tokens make is set aside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

DISTURBANCE = 0.1  # of weights, in a check: far above rounding, far below overflow


class NotSeparableError(RuntimeError):
    """Tokens cannot be told apart here; nothing has been changed."""


class Pair(NamedTuple):
    """The linear modules of one low-rank pair: the adapter computes `up(down(x))`, and nothing else reads them.

    Args:
        down (`nn.Module`): $A$: its weight has shape `(r, in)`, and it has no bias.
        up (`nn.Module`): $B$: its weight has shape `(out, r)`.
    """

    down: nn.Module
    up: nn.Module

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Both weights."""
        return self.down._parameters["weight"], self.up._parameters["weight"]  # type: ignore[return-value]


class Stack:
    """Pairs ready to run with two weights.

    Args:
        pairs (`Sequence[Pair]`): All trained pairs of the model.
        offsets (`Mapping[nn.Parameter, torch.Tensor]`): e of the weights that own tokens see moved.
        own (`torch.Tensor`): Which tokens are this step's own, boolean, shape `(batch, length)`.

    Attributes:
        riding (`dict[nn.Parameter, torch.Tensor]`): Gradients that riding tokens made, at w.
        read (`set[nn.Parameter]`): Weights that a backward pass has reached.
    """

    OWN, RIDING = 0, 1

    def __init__(self, pairs: Sequence[Pair], offsets: Mapping[nn.Parameter, torch.Tensor], own: torch.Tensor) -> None:
        self.pairs = pairs
        self.own = own
        self.riding: dict[nn.Parameter, torch.Tensor] = {}
        self.read: set[nn.Parameter] = set()
        self._masks: dict[torch.device, torch.Tensor] = {}
        self._weights: list[Any] = [weight for pair in pairs for weight in pair.weights]
        self._stacked = self._stack(offsets)

    def _stack(self, offsets: Mapping[nn.Parameter, torch.Tensor]) -> list[torch.Tensor]:
        """Return each weight's two versions side by side, in few operations for all."""
        stacked, first, second = [], [], []
        for i, weight in enumerate(self._weights):
            rows, columns = weight.shape
            both = weight.new_empty((2, rows, columns) if i % 2 == 0 else (rows, 2, columns))
            stacked.append(both.flatten(0, 1) if i % 2 == 0 else both.flatten(1, 2))
            halves = both.unbind(i % 2)
            first.append(halves[0])
            second.append(halves[1])
        moved = [i for i, weight in enumerate(self._weights) if weight in offsets]
        with torch.no_grad():
            torch._foreach_copy_(first, self._weights)
            torch._foreach_copy_(second, self._weights)
            if moved:
                torch._foreach_add_([first[i] for i in moved], [offsets[self._weights[i]] for i in moved])
        return stacked

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the context's forward and backward; it must outlive the backward pass.

        Raises:
            NotSeparableError: a pair ran on something else than the batch's tokens; raised by the forward.
        """
        with ExitStack() as undo, torch.enable_grad():
            versions = self._versions()
            for i, pair in enumerate(self.pairs):
                for side, module in enumerate(pair):
                    undo.callback(module._parameters.__setitem__, "weight", self._weights[2 * i + side])
                    module._parameters["weight"] = versions[2 * i + side]
                undo.callback(pair.down.register_forward_hook(self._halve).remove)
            yield

    def _versions(self) -> list[Any]:
        """Return the stacked weights, in the graph of those that require a gradient."""
        versions: list[Any] = list(self._stacked)
        trained = [i for i, weight in enumerate(self._weights) if weight.requires_grad]
        if trained:
            for i, version in zip(
                trained, _Both.apply(self, trained, *(self._weights[i] for i in trained)), strict=True
            ):
                versions[i] = version
        return versions

    def part(self, positions: Sequence[int], gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return what own tokens add to the gradients of some weights; what riding ones add is set aside.

        Args:
            positions (`Sequence[int]`): Of the weights.
            gradients (`Sequence[torch.Tensor | None]`): Of their two versions side by side; `None` without one.
        """
        halves: list[Any] = [None] * len(positions)
        for place, (i, gradient) in enumerate(zip(positions, gradients, strict=True)):
            if gradient is None:
                continue
            weight = self._weights[i]
            halves[place], riding = gradient.chunk(2, i % 2)
            before = self.riding.get(weight)
            self.riding[weight] = riding if before is None else before + riding
            self.read.add(weight)
        # Columns lie apart, and optimizers want them together: one operation copies them all.
        apart = [place for place, half in enumerate(halves) if half is not None and not half.is_contiguous()]
        together = [torch.empty_like(halves[place], memory_format=torch.contiguous_format) for place in apart]
        if apart:
            torch._foreach_copy_(together, [halves[place] for place in apart])
        for place, half in zip(apart, together, strict=True):
            halves[place] = half
        return halves

    def _halve(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Let each token keep its half of the hidden state."""
        if output.shape[:-1] != self.own.shape:
            raise NotSeparableError(
                f"an adapter ran on a tensor of shape {tuple(args[0].shape)} where the batch has tokens of shape "
                f"{tuple(self.own.shape)}; experts do, and models that flatten or turn their batch"
            )
        mask = self._masks.get(output.device)
        if mask is None:
            own = self.own.to(output.device)
            mask = self._masks[output.device] = torch.stack([own, ~own], dim=-1).unsqueeze(-1)
        return (output.unflatten(-1, (2, -1)) * mask).flatten(-2)

    def disturb(self, half: int) -> None:
        """Move the weights of own or of riding tokens, to see whether the others notice.

        Args:
            half (`int`): `Stack.OWN` or `Stack.RIDING`.
        """
        with torch.no_grad():
            for i, stacked in enumerate(self._stacked):
                stacked.unflatten(i % 2, (2, -1)).select(i % 2, half).add_(DISTURBANCE)

    def bypassed(self) -> list[nn.Parameter]:
        """Return the weights with a gradient that did not come through the stack."""
        return [w for w in self._weights if w.grad is not None and w not in self.read]


class _Both(torch.autograd.Function):
    """Two versions of each weight; the gradient of the first goes to the weight, that of the second is set aside.

    One node for all weights, so that their gradients are parted together.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, owner: Stack, positions: Sequence[int], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.owner, ctx.positions = owner, positions
        ctx.set_materialize_grads(False)
        return tuple(owner._stacked[i].view_as(owner._stacked[i]) for i in positions)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:  # noqa: D102
        return None, None, *ctx.owner.part(ctx.positions, gradients)
