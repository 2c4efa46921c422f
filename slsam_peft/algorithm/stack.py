r"""Runs some tokens of a batch at w + e and the others at w, in one pass.

A LoRA pair computes $B A x$. Where it is perturbed, $A$ becomes $[A + e_A;\, A]$ of twice the rank and $B$ becomes
$[B + e_B,\, B]$, and of the hidden $h = A x$, twice as wide, each token keeps one half: this step's own tokens the
first, those that ride along for the next step's ascent the second. x is read once, and a pair costs three thin
operations instead of two. Where a pair is not perturbed all tokens see the same weights, and only the weights'
gradients are told apart.

Both ways own tokens alone make the gradient that arrives at w, hooks and all; what riding tokens make is set aside.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from slsam_peft.algorithm.swap import Passage

DISTURBANCE = 0.1  # of weights, in a check: far above rounding, far below overflow


class NotSeparableError(RuntimeError):
    """Tokens cannot be told apart here; nothing has been changed.

    Args:
        reason (`str`): A clause without a full stop.
        ran (`bool`, *optional*, defaults to `False`): Whether a whole pass has run, which metrics have counted.
    """

    def __init__(self, reason: str, *, ran: bool = False) -> None:
        super().__init__(reason)
        self.ran = ran


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
        wanted (`Collection[nn.Parameter]`, *optional*): Weights whose riding gradient is wanted. Defaults to all.
        everywhere (`bool`, *optional*, defaults to `False`): Whether all pairs hold two weights, perturbed or not.
        extrapolated (`Mapping[nn.Parameter, torch.Tensor]`, *optional*): How far from w riding tokens see perturbed
            weights. Defaults to not at all.

    Attributes:
        riding (`dict[nn.Parameter, torch.Tensor]`): Gradients that riding tokens made, at w.
        passage (`Passage`): What has come through it.
    """

    OWN, RIDING = 0, 1

    def __init__(
        self,
        pairs: Sequence[Pair],
        offsets: Mapping[nn.Parameter, torch.Tensor],
        own: torch.Tensor,
        wanted: Collection[nn.Parameter] | None = None,
        everywhere: bool = False,
        extrapolated: Mapping[nn.Parameter, torch.Tensor] | None = None,
    ) -> None:
        self.pairs = pairs
        self.own = own
        self.riding: dict[nn.Parameter, torch.Tensor] = {}
        self.passage = Passage()
        self._weights: list[Any] = [weight for pair in pairs for weight in pair.weights]
        self._wanted = set(self._weights if wanted is None else wanted)
        self._masks: dict[torch.device, torch.Tensor] = {}
        perturbed = [pair for pair in pairs if everywhere or any(weight in offsets for weight in pair.weights)]
        self._stacked = self._stack(perturbed, offsets, extrapolated or {})

    def _stack(
        self,
        perturbed: Sequence[Pair],
        offsets: Mapping[nn.Parameter, torch.Tensor],
        extrapolated: Mapping[nn.Parameter, torch.Tensor],
    ) -> dict[nn.Parameter, torch.Tensor]:
        """Return the two versions of each weight of some pairs side by side, in few operations for all."""
        weights: list[Any] = [weight for pair in perturbed for weight in pair.weights]
        stacked, first, second = {}, [], []
        for i, weight in enumerate(weights):
            rows, columns = weight.shape
            both = weight.new_empty((2, rows, columns) if i % 2 == 0 else (rows, 2, columns))
            stacked[weight] = both.flatten(i % 2, i % 2 + 1)
            halves = both.unbind(i % 2)
            first.append(halves[0])
            second.append(halves[1])
        with torch.no_grad():
            if weights:
                torch._foreach_copy_(first, weights)
                torch._foreach_copy_(second, weights)
            for half, by in ((first, offsets), (second, extrapolated)):
                moved = [i for i, weight in enumerate(weights) if weight in by]
                if moved:
                    torch._foreach_add_([half[i] for i in moved], [by[weights[i]] for i in moved])
        return stacked

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the context's forward and backward; it must outlive the backward pass.

        Raises:
            NotSeparableError: a pair ran on something else than the batch's tokens; raised by the forward.
        """
        with ExitStack() as undo, torch.enable_grad():
            for pair in self.pairs:
                if pair.weights[0] in self._stacked:
                    self._install(pair, undo)
                    continue
                for side, module in enumerate(pair):
                    undo.callback(vars(module).pop, "forward", None)
                    vars(module)["forward"] = self._told_apart(pair.weights[side], side)
            yield

    def _install(self, pair: Pair, undo: ExitStack) -> None:
        """Hand a perturbed pair its weights side by side."""
        for side, (module, weight) in enumerate(zip(pair, pair.weights, strict=True)):
            undo.callback(module._parameters.__setitem__, "weight", weight)
            module._parameters["weight"] = _Both.apply(weight, self._stacked[weight], self, side)
        undo.callback(pair.down.register_forward_hook(self._halve).remove)

    def _halve(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Let each token keep its half of the hidden state."""
        return (output.unflatten(-1, (2, -1)) * self._mask(output)).flatten(-2)

    def _told_apart(self, weight: nn.Parameter, side: int) -> Any:
        """Return a forward of a linear module whose weight's gradient is that of own tokens."""

        def forward(input: torch.Tensor) -> torch.Tensor:
            return _Apart.apply(input, weight, self, self._mask(input), side)  # type: ignore[return-value]

        return forward

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return which half is each token's, boolean, shape `(batch, length, 2, 1)`."""
        if hidden.shape[:-1] != self.own.shape:
            raise NotSeparableError(
                f"an adapter ran on a tensor of shape {tuple(hidden.shape)} where the batch has tokens of shape "
                f"{tuple(self.own.shape)}; experts do, and models that flatten or turn their batch"
            )
        mask = self._masks.get(hidden.device)
        if mask is None:
            own = self.own.to(hidden.device)
            mask = self._masks[hidden.device] = torch.stack([own, ~own], dim=-1).unsqueeze(-1)
        return mask

    def wants(self, weight: Any) -> bool:
        """Whether the riding gradient of a weight is wanted."""
        return weight in self._wanted

    def keep(self, weight: Any, own: torch.Tensor, riding: torch.Tensor | None) -> None:
        """Note that a backward pass has reached a weight, and what riding tokens made."""
        self.passage.see(weight, own)
        if riding is not None:
            before = self.riding.get(weight)
            self.riding[weight] = riding if before is None else before + riding

    def disturb(self, half: int) -> None:
        """Move the weights of own or of riding tokens, to see whether the others notice.

        Args:
            half (`int`): `Stack.OWN` or `Stack.RIDING`.
        """
        with torch.no_grad():
            for weight, stacked in self._stacked.items():
                dim = 0 if stacked.shape[0] != weight.shape[0] else 1
                stacked.unflatten(dim, (2, -1)).select(dim, half).add_(DISTURBANCE)


class Beside:
    """Pairs that compute with a second pair beside each: [A; A2] and [B, B2], for all tokens.

    Args:
        beside (`Mapping[Pair, tuple[torch.Tensor, torch.Tensor]]`): A2, shape `(r, in)`, and B2, shape `(out, r)`, of
            each pair.
        step (`Any`): The step that it is made for.

    Attributes:
        gradients (`dict[nn.Parameter, torch.Tensor]`): Of the second pairs' factors, by the factors they lie beside;
            added up over micro-batches.
    """

    def __init__(self, beside: Mapping[Pair, tuple[torch.Tensor, torch.Tensor]], step: Any) -> None:
        self.step = step
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}
        with torch.no_grad():
            self._both = {
                pair: [
                    torch.cat([weight, second.to(weight.dtype)], dim=side)
                    for side, (weight, second) in enumerate(zip(pair.weights, seconds, strict=True))
                ]
                for pair, seconds in beside.items()
            }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the context's forward and backward; it must outlive the backward pass."""
        with ExitStack() as undo, torch.enable_grad():
            for pair, both in self._both.items():
                for side, (module, weight) in enumerate(zip(pair, pair.weights, strict=True)):
                    undo.callback(module._parameters.__setitem__, "weight", weight)
                    module._parameters["weight"] = _Both.apply(weight, both[side], self, side)
            yield

    def wants(self, weight: Any) -> bool:
        """Whether the second gradient of a weight is wanted: all are."""
        return True

    def keep(self, weight: Any, own: torch.Tensor, second: torch.Tensor | None) -> None:
        """Add a gradient of a second factor to those of the micro-batches before."""
        if second is not None:
            before = self.gradients.get(weight)
            self.gradients[weight] = second.clone() if before is None else before + second


class _Both(torch.autograd.Function):
    """Two versions of a weight; the gradient of the first goes to the weight, that of the second is set aside."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, weight: torch.Tensor, stacked: torch.Tensor, owner: Stack | Beside, dim: int
    ) -> torch.Tensor:
        ctx.weight, ctx.owner, ctx.dim = weight, owner, dim
        return stacked.view_as(stacked)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        own, riding = gradient.chunk(2, ctx.dim)
        own = own.contiguous()
        ctx.owner.keep(ctx.weight, own, riding if ctx.owner.wants(ctx.weight) else None)
        return own, None, None, None


class _Apart(torch.autograd.Function):
    """A linear map whose weight's gradient is that of own tokens; that of the others is set aside or not computed.

    Of a pair's two maps the mask goes on the thin side: the gradient of A's output, the input of B.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, owner: Stack, mask: torch.Tensor, side: int
    ) -> torch.Tensor:
        ctx.weight, ctx.owner, ctx.side, ctx.dtypes = weight, owner, side, (input.dtype, weight.dtype)
        kind = input.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # as it would cast them
            dtype = torch.get_autocast_dtype(kind)
            input, weight = (x.to(dtype) if x.dtype != torch.float64 else x for x in (input, weight))
        ctx.save_for_backward(input, weight.detach(), mask)
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]  # noqa: D102
        input, weight, mask = ctx.saved_tensors
        from_input = (gradient @ weight).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:  # frozen for now
            return from_input, None, None, None, None
        both = ctx.owner.wants(ctx.weight)
        thin = (gradient, input)[ctx.side]
        thin = (thin.unsqueeze(-2) * mask).flatten(-2) if both else thin * mask[..., 0, :]
        left, right = (thin, input) if ctx.side == 0 else (gradient, thin)
        found = (left.flatten(0, -2).t() @ right.flatten(0, -2)).to(ctx.dtypes[1])
        own, riding = found.chunk(2, ctx.side) if both else (found, None)
        own = own.contiguous()
        ctx.owner.keep(ctx.weight, own, riding)
        return from_input, own, None, None, None
