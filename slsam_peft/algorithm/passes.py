"""Runs the two passes of a step over its micro-batches: which arms are on, where passes are cut, what is replayed."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.buffers import Buffers
from slsam_peft.algorithm.horizon import CachedHiddenState, Horizon
from slsam_peft.algorithm.leaks import CrossLayerDependencyError
from slsam_peft.algorithm.perturbation import Firings, Shift, ascent_offsets, perturbed, split

logger = logging.getLogger(__name__)

Closure = Callable[[], torch.Tensor]

# Loss with and without the cache; the same kernels give the same bits, others round otherwise.
REUSE_RTOL = {torch.float64: 1e-12}
REUSE_RTOL_ELSE = 1e-5

NO_GRADIENT = (
    "does not require grad and does not have a grad_fn"  # torch, of a loss that nothing trained had a part in
)


@dataclass(frozen=True)
class Passes:
    """The passes over one micro-batch. Each runs forward and backward and returns the loss.

    Args:
        logged (`Closure`): The whole micro-batch; metrics and logs count it.
        unlogged (`Closure`): The same without side effects.
        part (`Closure`, *optional*): The sequences that `ascent="partial"` takes from a lone micro-batch; unlogged.
        forward_only (`Closure`, *optional*): The whole micro-batch, forward only; unlogged. The hidden-state cache is
            checked with it once; without one, second passes run whole.
        sequences (`tuple[int, int]`, *optional*): For `ascent="ahead"`: how many sequences of the micro-batch are of
            this step, and how many, behind them, of the next one.
    """

    logged: Closure
    unlogged: Closure
    part: Closure | None = None
    forward_only: Closure | None = None
    sequences: tuple[int, int] | None = None


@dataclass(eq=False)
class Pending:
    """A micro-batch that waits for its descent pass, with the random state its ascent pass started from."""

    passes: Passes
    state: rng.State
    cached_states: list[CachedHiddenState] = field(default_factory=list)
    idle: bool = False  # whether nothing that is trained takes part in its loss
    idle_loss: torch.Tensor | None = None  # which is this one then, where it is known


@dataclass(eq=False)
class Step:
    """The step in progress: what is on, what has been computed."""

    mask: torch.Tensor  # (L,) boolean, perturbed arms
    trained: torch.Tensor  # (L,) boolean, arms that get a descent gradient
    inclusion: torch.Tensor  # (L,) realised inclusion probabilities of the perturbed arms
    lowest_active: int  # lowest depth of a perturbed arm; -1: below the blocks, or unknown
    lowest_trained: int  # lowest depth of a trained arm
    count: int  # micro-batches
    ascents: int = 0  # of which the first so many have an ascent pass
    cached: int = 0  # of which so many start their second pass at the lowest active block
    pending: list[Pending] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    ascent_squared: torch.Tensor | None = None  # (L,) squared norms of the ascent gradient
    shifted: list[torch.Tensor] = field(default_factory=list)  # w + e per parameter, where sequences are told apart
    next_ascent: dict[int, torch.Tensor] = field(default_factory=dict)  # the next step's ascent gradient, by position
    ascent_loss: torch.Tensor | None = None
    descent_loss: torch.Tensor | None = None

    def losses(self) -> torch.Tensor:
        """Return the loss at w + e and the loss at w, shape `(2,)`; one stands in where the other was not computed."""
        descent = torch.full((), math.nan) if self.descent_loss is None else self.descent_loss
        ascent = descent if self.ascent_loss is None else self.ascent_loss
        both = torch.stack([descent.reshape(()), ascent.reshape(()).to(descent.device)])
        return both.to(torch.promote_types(both.dtype, torch.float32))


def _loss(returned: Any) -> torch.Tensor:
    if isinstance(returned, int | float):
        return torch.tensor(float(returned))
    if not isinstance(returned, torch.Tensor) or returned.numel() != 1:
        what = f"shape {tuple(returned.shape)}" if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise TypeError(f"the closure returned {what}; it must return its loss, a tensor of one element or a number.")
    return returned.detach()


def _loss_with_gradient(closure: Closure, on: torch.Tensor) -> torch.Tensor | None:
    """Run a closure and return its loss; `None` where none of the arms that are on, not all there are, took part."""
    try:
        return _loss(closure())
    except RuntimeError as error:
        if NO_GRADIENT not in str(error) or bool(on.all()):
            raise
        return None


def _ignore_requires_grad_(parameter: nn.Parameter) -> None:
    """Let `parameter.requires_grad_(...)` change nothing: an attribute of the instance hides the class's method."""

    def unchanged(requires_grad: bool = True) -> nn.Parameter:
        return parameter

    vars(parameter)["requires_grad_"] = unchanged


def _heed_requires_grad_(parameter: nn.Parameter) -> None:
    """Undo `_ignore_requires_grad_`."""
    vars(parameter).pop("requires_grad_", None)


def _close(now: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    """Whether two passes left the same in a buffer."""
    if now is None or before is None:
        return now is before
    tolerance = REUSE_RTOL.get(before.dtype, REUSE_RTOL_ELSE)
    return now.shape == before.shape and torch.allclose(now, before, rtol=tolerance, atol=tolerance, equal_nan=True)


class PassRunner:
    """Runs ascent and descent passes with the arms of a step switched on.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
        owner (`torch.Tensor`): Arm index of each, shape `(P,)`.
        linears (`Sequence[nn.Module | None]`): For each its linear module, or `None`.
        horizon (`Horizon` or `None`): Cuts the passes; `None` runs them whole.
        buffered (`Mapping[str, nn.Module]`, *optional*): Modules, by name, whose buffers a second pass must find as
            the first one did.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        owner: torch.Tensor,
        linears: Sequence[nn.Module | None],
        horizon: Horizon | None,
        buffered: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.parameters = parameters
        self.owner = owner
        self.linears = linears
        self.horizon = horizon
        self.firings = Firings()
        self.accelerators = rng.sources_of(parameters, buffered)
        self._checked_blocks: set[int] = set()
        self._idle = False

    def members(self, arms: torch.Tensor) -> list[int]:
        """Return the positions of the parameters of the arms in a mask, shape `(L,)`."""
        return arms[self.owner].nonzero().flatten().tolist()

    @contextmanager
    def switched(self, trained: torch.Tensor) -> Iterator[None]:
        """Switch the arms that are not trained off inside the context.

        They stay off whatever the loss does: a loss that switches adapters (DPO's reference pass) has PEFT turn every
        factor on again, and a checkpointed block would then be recomputed with another graph than it was run with.
        """
        off = [self.parameters[i] for i in self.members(~trained)]
        try:
            for parameter in off:
                parameter.requires_grad_(False)
                _ignore_requires_grad_(parameter)
            yield
        finally:
            for parameter in off:
                _heed_requires_grad_(parameter)
                parameter.requires_grad_(True)

    def clear(self, arms: torch.Tensor | None = None) -> None:
        """Drop the gradients of the given arms, or of all."""
        for i in range(len(self.parameters)) if arms is None else self.members(arms):
            self.parameters[i].grad = None

    def void(self) -> None:
        """Make one gradient NaN, for whoever must see for itself that a step is void."""
        found = next((p.grad for p in self.parameters if p.grad is not None), None)
        if found is not None:
            found.fill_(math.nan)
        else:
            self.parameters[0].grad = torch.full_like(self.parameters[0], math.nan)

    def shifts(
        self, members: Sequence[int], gradients: Sequence[torch.Tensor], norm: torch.Tensor, rho: float
    ) -> list[Shift]:
        """Return e for the parameters at the given positions: a branch where its linear module ran, else in place.

        Args:
            members (`Sequence[int]`): The positions.
            gradients (`Sequence[torch.Tensor]`): Their ascent gradients.
            norm (`torch.Tensor`): As in `ascent_offsets`.
            rho (`float`): Radius.
        """
        ran = [linear if (linear := self.linears[i]) in self.firings.fired else None for i in members]
        offsets = ascent_offsets(gradients, norm, rho)
        return [Shift(self.parameters[i], e, linear) for i, e, linear in zip(members, offsets, ran, strict=True)]

    def watched_linears(self, mask: torch.Tensor) -> list[nn.Module]:
        """Return the linear modules of the arms in a mask that an additive branch could carry."""
        return [linear for i in self.members(mask) if (linear := self.linears[i]) is not None]

    def fired(self) -> torch.Tensor:
        """Return which parameters' linear modules ran as modules when last watched, boolean, shape `(P,)`."""
        return torch.tensor([linear in self.firings.fired for linear in self.linears])

    def set_fired(self, fired: torch.Tensor) -> None:
        """Restore what `fired` returned."""
        on = fired.tolist()
        self.firings.fired = {m for m, f in zip(self.linears, on, strict=True) if f and m is not None}

    def ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Add the ascent gradient of one micro-batch to `.grad`; return its loss."""
        try:
            return self._ascend(step, pending, closure)
        except CrossLayerDependencyError as error:
            self._stop_cutting(error, step, pending)
            return self._ascend(step, pending, closure)

    def descend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Add the descent gradient of one micro-batch, at w + e, to `.grad`; return its loss."""
        try:
            return self._descend(step, pending, closure)
        except CrossLayerDependencyError as error:
            self._stop_cutting(error, step, pending)
            return self._descend(step, pending, closure)

    def _stop_cutting(self, error: CrossLayerDependencyError, step: Step, pending: Pending) -> None:
        """Let this pass, which has lost nothing yet, and all later ones run whole."""
        self.horizon = None
        if step.count == 1:
            self.clear()  # what a closure that accumulates gathered before the forward that raised the error
        rng.restore(pending.state)
        logger.warning("passes are not cut: %s. Every pass runs whole, and costs what that costs.", error)

    def _ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        # Keep what enters the lowest active block if the descent pass may start from it.
        horizon = self._horizon(step)
        keep = (
            horizon is not None
            and (pending.passes.forward_only is not None or self._is_checked(horizon, step.lowest_active))
            and closure is not pending.passes.part  # whose sequences fit no other pass
        )
        context = horizon.truncated(step.lowest_active, step.lowest_trained, keep=keep) if horizon else nullcontext([])
        with self.firings.watch(self.watched_linears(step.mask)), context as cached_states:
            loss = _loss_with_gradient(closure, step.mask)
        if loss is None:
            cached_states.clear()
            pending.idle = torch.equal(step.mask, step.trained) and closure is not pending.passes.part
            loss = pending.idle_loss = self._idle_loss(step, pending, closure)
        self.clear(~step.mask)
        if loss is None:
            return self._unknown()
        self._check_replay(pending, closure, loss)
        # The first time, check that it does give the same loss.
        if horizon is not None and keep and step.lowest_active > 0:
            pending.cached_states = cached_states
            self._check_reuse(horizon, step, pending, loss)
            step.cached += any(cached.hidden is not None for cached in pending.cached_states)
        step.ascent_loss = loss if step.ascent_loss is None else step.ascent_loss + loss
        return loss

    def _descend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        if step.ascents:
            rng.restore(pending.state)
        if pending.idle:  # there is no gradient at w + e either
            return self._added(step, pending.idle_loss)
        # Start from the cache where there is one, and stop where nothing below is trained.
        horizon = self._horizon(step)
        if horizon is None:
            context = nullcontext()
        elif pending.cached_states:
            context = horizon.resumed(step.lowest_active, step.lowest_trained, pending.cached_states)
        else:
            context = horizon.truncated(max(step.lowest_trained, 0), step.lowest_trained, keep=False)
        # Run at w + e; sequences of the next step, where some ride along, run at w.
        if pending.passes.sequences is None:
            with perturbed(step.shifts), context:
                loss = _loss_with_gradient(closure, step.trained)
            loss = self._idle_loss(step, pending, closure) if loss is None else loss
        else:
            with context:
                loss = self._run_split(step, pending.passes.sequences, closure)
        pending.cached_states.clear()
        self.clear(~step.trained)
        return self._added(step, loss)

    def _added(self, step: Step, loss: torch.Tensor | None) -> torch.Tensor:
        """Add the loss of a descent pass to the step's, if it is known, and return it."""
        if loss is None:
            return self._unknown()
        step.descent_loss = loss if step.descent_loss is None else step.descent_loss + loss
        return loss

    def _idle_loss(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor | None:
        """Return the loss of a pass in which nothing that is switched on took part; `None` where it cannot be had."""
        if not self._idle:
            self._idle = True
            logger.warning(
                "none of the drawn arms takes part in the loss of a batch (blocks that are skipped at random, as "
                "layerdrop does, or batches without what an arm works on): its gradient is 0. Steps without any "
                "gradient are skipped, and counted in slsam/skipped."
            )
        rng.restore(pending.state)
        if not torch.equal(step.mask, step.trained):  # uncut, the pass has the gradient of other arms
            return _loss_with_gradient(
                pending.passes.unlogged if closure is pending.passes.logged else closure, step.trained
            )
        if pending.passes.forward_only is None or closure is pending.passes.part:
            return None
        return _loss(pending.passes.forward_only())

    def _unknown(self) -> torch.Tensor:
        return torch.full((), math.nan, device=self.parameters[0].device)

    def _check_replay(self, pending: Pending, closure: Closure, loss: torch.Tensor) -> None:
        """Check, once and where a pass changes buffers, that it does so again from the same random state.

        Raises:
            ValueError: it does not: what the second pass of a step would see is other noise than the first one's.
        """
        buffers = self.accelerators.buffers
        if buffers.settled or loss.is_meta:
            return
        buffers.settled = True
        changed = buffers.changed(pending.state[Buffers][1])
        if not changed:
            return
        first = [None if b.now is None else b.now.detach().clone() for b in changed]
        gradients = [(p, None if p.grad is None else p.grad.clone()) for p in self.parameters]
        after = rng.snapshot(self.accelerators)
        try:
            rng.restore(pending.state)
            again = pending.passes.forward_only or (
                pending.passes.unlogged if closure is pending.passes.logged else closure
            )
            again()
            pairs = zip(changed, first, strict=True)
            other = [b.name for b, f in pairs if not _close(b.now, f)]
        finally:
            rng.restore(after)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        if other:
            raise ValueError(
                f"{other[0]}{f' and {len(other) - 1} buffers more' if len(other) > 1 else ''} change in each forward "
                "pass by noise that torch's, Python's and NumPy's generators do not make, so the second pass of a "
                "step would see other noise than the first. Use another adapter, turn that noise off, or set rho=0."
            )

    def _run_split(self, step: Step, sequences: tuple[int, int], closure: Closure) -> torch.Tensor:
        """Run a pass at w + e on the sequences of this step and, for the next one's ascent, at w on the others."""
        if not step.shifted:
            offsets = {shift.parameter: shift.offset for shift in step.shifts}
            with torch.no_grad():
                step.shifted = [p + offsets.pop(p) if p in offsets else p for p in self.parameters]
            step.shifts.clear()  # e is not needed beside w + e
        # Each part of the batch has weights of its own, so that its gradient is told from the other's.
        first, last = ([w.detach().requires_grad_() for w in weights] for weights in (step.shifted, self.parameters))
        with split([linear for linear in self.linears if linear is not None], first, last, sequences):
            loss = _loss(closure())
        for i, (parameter, *parts) in enumerate(zip(self.parameters, first, last, strict=True)):
            if parameter.grad is not None:
                raise ValueError(
                    f"an adapter weight of shape {tuple(parameter.shape)} was used outside its module, where "
                    "sequences cannot be told apart: ascent='ahead' does not work here, use ascent='partial'."
                )
            parameter.grad, next_ascent = (part.grad for part in parts)
            if sequences[1] and next_ascent is not None:
                step.next_ascent[i] = next_ascent
        return loss

    def _horizon(self, step: Step) -> Horizon | None:
        return self.horizon if step.lowest_active >= 0 else None

    def _is_checked(self, horizon: Horizon, lowest_active: int) -> bool:
        """Whether the cache has been checked: at this very block where more may leave the blocks, else at any."""
        anywhere = bool(self._checked_blocks) and not horizon.shares and lowest_active < len(horizon.blocks)
        return lowest_active in self._checked_blocks or anywhere

    def _check_reuse(self, horizon: Horizon, step: Step, pending: Pending, loss: torch.Tensor) -> None:
        """Check, once or once per block, that the stack from there on depends on the cached hidden state alone.

        The pass is run again at w from the cached hidden state and must give the loss of the first pass. A stack with
        another cross-layer dependency (keys and values shared across layers, router losses) fails, and the cache is
        turned off.
        """
        forward_only = pending.passes.forward_only
        if forward_only is None or self._is_checked(horizon, step.lowest_active):
            return
        if not any(cached.hidden is not None for cached in pending.cached_states):
            return
        if loss.is_meta:  # no values to compare
            self._checked_blocks.add(step.lowest_active)
            return
        # The check runs between the passes: it leaves gradients and generators as it finds them.
        gradients = [(p, p.grad) for p in self.parameters]
        after = rng.snapshot(self.accelerators)
        try:
            rng.restore(pending.state)
            whole = max(step.lowest_active, step.lowest_trained)
            with (
                horizon.resumed(step.lowest_active, whole, pending.cached_states),
                horizon.noting_kept(step.lowest_active),
            ):
                again = _loss(forward_only())
            same = torch.allclose(again, loss, rtol=REUSE_RTOL.get(loss.dtype, REUSE_RTOL_ELSE), atol=0.0)
            reason = f"the loss was {float(again)!r} instead of {float(loss)!r}"
        except Exception as error:  # noqa: BLE001 - such a stack may fail in any way; the plain pass has just run
            same, reason = False, f"it raised {type(error).__name__}: {error}"
        finally:
            rng.restore(after)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        self._checked_blocks.add(step.lowest_active)
        if not same:
            horizon.reuse = False
            pending.cached_states = []
            logger.warning(
                "the hidden-state cache is off: started from the hidden state that enters block %d, %s, so the blocks "
                "pass on more than a hidden state. Second passes run whole.",
                step.lowest_active,
                reason,
            )
