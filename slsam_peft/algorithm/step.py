"""The records of a step: the passes over its micro-batches, those that wait for e, and what has been computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.cut_pass import CachedHiddenState
from slsam_peft.algorithm.perturbation import Perturbation
from slsam_peft.algorithm.sampler import Draw

Closure = Callable[[], torch.Tensor]


class Cut(NamedTuple):
    """Some sequences of a micro-batch, to be run alone.

    Args:
        run (`Closure`): Runs forward and backward on them and returns the loss, without side effects.
        items (`torch.Tensor` or `float`): What the trainer would divide by if its loss were their mean, see
            `Passes.divisor`.
        forward_only (`Closure`, *optional*): The forward alone.
        seen_in (callable, *optional*): Returns their loss, as `run` would, in the last pass over the whole
            micro-batch; `None` where it is not known.
    """

    run: Closure
    items: torch.Tensor | float = 1.0
    forward_only: Closure | None = None
    seen_in: Callable[[], torch.Tensor | None] | None = None


class Riding(NamedTuple):
    """A micro-batch with sequences of the next step behind its own.

    Args:
        logged, unlogged (`Closure`): As in `Passes`, over all of it; the losses of both are added, each scaled as this
            step's are without the others.
        both_losses (`Closure`): Runs the forward alone; returns the losses of own and of riding tokens, shape `(2,)`.
        own (`torch.Tensor`): Which tokens these are, boolean, shape `(batch, length)`.
        items (`torch.Tensor` or `float`): `Cut.items` of the riding sequences.
    """

    logged: Closure
    unlogged: Closure
    both_losses: Closure
    own: torch.Tensor
    items: torch.Tensor | float = 1.0


@dataclass(frozen=True)
class Passes:
    """The passes over one micro-batch. Each runs forward and backward and returns the loss.

    Args:
        logged (`Closure`): The whole micro-batch; metrics and logs count it.
        unlogged (`Closure`): The same without side effects.
        forward_only (`Closure`, *optional*): The whole micro-batch, forward only; unlogged. The hidden-state cache is
            checked with it once; without one, second passes run whole.
        sequences (`int`, *optional*): How many sequences it has; `None` where that is not known.
        cut (callable, *optional*): Number of sequences -> `Cut`, the first so many; `None` where it cannot be cut.
        items (`torch.Tensor` or `float`, *optional*): As in `Cut`, for the whole micro-batch.
        divisor (`torch.Tensor` or `float`, *optional*): What the losses are divided by: a sum over so many items of
            the whole step. Defaults to the number of micro-batches, each of which counts as one item then.
        riding (`Riding`, *optional*): The micro-batch with sequences of the next step; `None` where none ride along.
        rode (callable, *optional*): Returns the mean loss, in the last pass, of the sequences that rode along in the
            step before, and what it was there, each of shape `()`; `None` where it is not known.
        whole (`bool`, *optional*, defaults to `False`): Whether an ascent that wants a part is to take all of it.
    """

    logged: Closure
    unlogged: Closure
    forward_only: Closure | None = None
    sequences: int | None = None
    cut: Callable[[int], Cut] | None = None
    items: torch.Tensor | float = 1.0
    divisor: torch.Tensor | float | None = None
    riding: Riding | None = None
    rode: Callable[[], tuple[torch.Tensor, torch.Tensor] | None] | None = None
    whole: bool = False


@dataclass(eq=False)
class Pending:
    """A micro-batch that waits for its descent pass, with the random state its ascent pass started from."""

    passes: Passes
    state: rng.State
    whole: bool = False  # its ascent pass ran on all of it
    cut: Cut | None = None  # what its ascent pass ran on, where that was a part
    cached_states: list[CachedHiddenState] = field(default_factory=list)
    idle: bool = False  # whether nothing that is trained takes part in its loss
    idle_loss: torch.Tensor | None = None  # which is this one then, where it is known

    @property
    def forward_only(self) -> Closure | None:
        """The forward alone of what its ascent pass runs on; `None` where there is none."""
        return self.passes.forward_only if self.cut is None else self.cut.forward_only


@dataclass(eq=False)
class Step:
    """The step in progress: what is on, what has been computed."""

    draw: Draw  # the perturbed arms
    trained: torch.Tensor  # (L,) boolean, arms that get a descent gradient
    lowest_active: int  # lowest depth of a perturbed arm; -1: below the blocks, or unknown
    lowest_trained: int  # lowest depth of a trained arm
    below: torch.Tensor  # (L,) boolean, arms that lie below it
    count: int  # micro-batches
    next_mask: torch.Tensor | None = None  # (L,) boolean, arms that the next step perturbs, where it is drawn already
    taken: int = 0  # sequences whose ascent passes have run
    ascents: int = 0  # micro-batches with an ascent pass
    cached: int = 0  # of which so many start their second pass at the lowest active block
    uncut: bool = False  # whether passes that make gradients of the perturbed arms ran whole
    items: torch.Tensor | float = 0.0  # of the ascent passes, see `Cut`
    divisor: torch.Tensor | float = 1.0  # see `Passes`
    pending: list[Pending] = field(default_factory=list)
    late: list[Pending] = field(default_factory=list)  # that wait behind them, and have no ascent pass
    given: bool = False  # whether the ascent passes of this rank have all run
    perturbation: Perturbation | None = None
    lone: Pending | None = None  # the only micro-batch, where sequences of the next step may ride along in its pass
    ascent_squared: torch.Tensor | None = None  # (L,) squared norms of the ascent gradient of the sequences' mean loss
    rho: torch.Tensor | None = None  # length of e, as the radius measures it
    slope: torch.Tensor | None = None  # what e raises the ascent sequences' mean loss by, to first order
    riding: dict[int, torch.Tensor] = field(default_factory=dict)  # the next step's ascent gradient, by position
    rode_share: torch.Tensor | None = None  # of the ranks on which something rode along
    extrapolated: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # how far from w riding tokens run, by position
    ascent_loss: torch.Tensor | None = None  # at w, in the loss's own scale
    seen_loss: torch.Tensor | None = None  # of the ascent's sequences at w + e, in the loss's own scale
    descent_loss: torch.Tensor | None = None  # at w + e, of the step's own sequences
    rode_losses: tuple[torch.Tensor, torch.Tensor] | None = None  # of the ascent's sequences: now, and when they rode

    @property
    def mask(self) -> torch.Tensor:
        """Perturbed arms, shape `(L,)`."""
        return self.draw.mask

    def losses(self, device: torch.device) -> torch.Tensor:
        """Return the loss at w + e, the loss at w and that of the ascent's sequences at w + e, shape `(3,)`.

        One of the first two stands in where the other was not computed; so does the first for the third.
        """
        descent = torch.full((), math.nan, device=device) if self.descent_loss is None else self.descent_loss
        ascent = descent if self.ascent_loss is None else self.ascent_loss
        seen = descent if self.seen_loss is None else self.seen_loss
        losses = torch.stack([loss.reshape(()).to(descent.device) for loss in (descent, ascent, seen)])
        return losses.to(torch.promote_types(losses.dtype, torch.float32))


def quotient(dividend: torch.Tensor | float, divisor: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """Divide two counts in a tensor's precision, on its device, without reading them; shape `()`."""
    one = torch.ones((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    brought = [x.reshape(()).to(one) if isinstance(x, torch.Tensor) else x for x in (dividend, divisor)]
    return one * brought[0] / brought[1]


def loss_of(returned: Any) -> torch.Tensor:
    """Return, detached, the loss that a closure has returned.

    Raises:
        TypeError: it is neither a tensor of one element nor a number.
    """
    if isinstance(returned, int | float):
        return torch.tensor(float(returned))
    if not isinstance(returned, torch.Tensor) or returned.numel() != 1:
        what = f"shape {tuple(returned.shape)}" if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise TypeError(f"the closure returned {what}; it must return its loss, a tensor of one element or a number.")
    return returned.detach()


def added(total: torch.Tensor | None, loss: torch.Tensor) -> torch.Tensor:
    """Add a loss to those before it; `None` is none."""
    return loss if total is None else total + loss
