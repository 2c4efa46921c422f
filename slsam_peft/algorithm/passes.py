"""Runs a step's passes over its micro-batches: what is on, at which weights, where they are cut, what is replayed."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.buffers import Buffers
from slsam_peft.algorithm.horizon import CachedHiddenState, Horizon
from slsam_peft.algorithm.leaks import CrossLayerDependencyError
from slsam_peft.algorithm.perturbation import Perturbation
from slsam_peft.algorithm.sampler import Draw
from slsam_peft.algorithm.stack import NotSeparableError, Pair, Stack
from slsam_peft.algorithm.swap import Sites

logger = logging.getLogger(__name__)

Closure = Callable[[], torch.Tensor]

# Loss with and without the cache; the same kernels give the same bits, others round otherwise.
REUSE_RTOL = {torch.float64: 1e-12}
REUSE_RTOL_ELSE = 1e-5
SEPARATE_RTOL = 1e-5  # loss of own tokens beside riding ones at two weights: the same kernels on the same numbers

NO_GRADIENT = (
    "does not require grad and does not have a grad_fn"  # torch, of a loss that nothing trained had a part in
)


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


@dataclass(eq=False)
class Step:
    """The step in progress: what is on, what has been computed."""

    draw: Draw  # the perturbed arms
    trained: torch.Tensor  # (L,) boolean, arms that get a descent gradient
    lowest_active: int  # lowest depth of a perturbed arm; -1: below the blocks, or unknown
    lowest_trained: int  # lowest depth of a trained arm
    count: int  # micro-batches
    next_mask: torch.Tensor | None = None  # (L,) boolean, arms that the next step perturbs, where it is drawn already
    taken: int = 0  # sequences whose ascent passes have run
    ascents: int = 0  # micro-batches with an ascent pass
    cached: int = 0  # of which so many start their second pass at the lowest active block
    items: torch.Tensor | float = 0.0  # of the ascent passes, see `Cut`
    divisor: torch.Tensor | float = 1.0  # see `Passes`
    pending: list[Pending] = field(default_factory=list)
    perturbation: Perturbation | None = None
    lone: Pending | None = None  # the only micro-batch, where sequences of the next step may ride along in its pass
    ascent_squared: torch.Tensor | None = None  # (L,) squared norms of the ascent gradient of the sequences' mean loss
    rho: torch.Tensor | None = None  # length of e
    riding: dict[int, torch.Tensor] = field(default_factory=dict)  # the next step's ascent gradient, by position
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


def _loss(returned: Any) -> torch.Tensor:
    if isinstance(returned, int | float):
        return torch.tensor(float(returned))
    if not isinstance(returned, torch.Tensor) or returned.numel() != 1:
        what = f"shape {tuple(returned.shape)}" if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise TypeError(f"the closure returned {what}; it must return its loss, a tensor of one element or a number.")
    return returned.detach()


def _added(total: torch.Tensor | None, loss: torch.Tensor) -> torch.Tensor:
    return loss if total is None else total + loss


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
        sites (`Sites`): For each where modules read it; those without a place are moved in place.
        horizon (`Horizon` or `None`): Cuts the passes; `None` runs them whole.
        pairs (`Sequence[Pair]`, *optional*, defaults to `()`): The low-rank pairs that hold all parameters, where
            sequences of the next step may ride along.
        buffered (`Mapping[str, nn.Module]`, *optional*): Modules, by name, whose buffers a second pass must find as
            the first one did.

    Attributes:
        in_place (`set[nn.Parameter]`): Parameters that are moved in place, since a pass read them past their modules.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        owner: torch.Tensor,
        sites: Sites,
        horizon: Horizon | None,
        pairs: Sequence[Pair] = (),
        buffered: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.parameters = parameters
        self.owner = owner
        self._arm_of: list[int] = owner.tolist()
        self.sites = sites
        self.horizon = horizon
        self.pairs = tuple(pairs)
        self.in_place = {p for p in parameters if not sites.get(p)}
        self.accelerators = rng.sources_of(parameters, buffered)
        self._read: set[nn.Parameter] = set()  # seen to be read by their modules
        self._checked_blocks: set[int] = set()
        self._separate = self._ridden = False
        self._idle = False

    def members(self, arms: torch.Tensor) -> list[int]:
        """Return the positions of the parameters of the arms in a mask, shape `(L,)`."""
        on = arms.tolist()
        return [i for i, arm in enumerate(self._arm_of) if on[arm]]

    def thawed(self) -> torch.Tensor:
        """Return which arms have a parameter that requires a gradient, boolean, shape `(L,)`.

        Callbacks and users freeze parameters in the middle of training; those are left alone.
        """
        on = {arm for arm, p in zip(self._arm_of, self.parameters, strict=True) if p.requires_grad}
        return torch.tensor([arm in on for arm in range(max(self._arm_of) + 1)])

    @contextmanager
    def switched(self, trained: torch.Tensor) -> Iterator[None]:
        """Switch the arms that are not trained off inside the context, and what was off already stays off.

        They stay off whatever the loss does: a loss that switches adapters (DPO's reference pass) has PEFT turn every
        factor on again, and a checkpointed block would then be recomputed with another graph than it was run with.
        """
        idle = [self.parameters[i] for i in self.members(~trained)]
        off = [p for p in idle if p.requires_grad]
        frozen = [p for p in self.parameters if not p.requires_grad and "requires_grad_" not in vars(p)]
        try:
            for parameter in off:
                parameter.requires_grad_(False)
            for parameter in (*off, *frozen):
                _ignore_requires_grad_(parameter)
            yield
        finally:
            for parameter in (*off, *frozen):
                _heed_requires_grad_(parameter)
            for parameter in off:
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

    def perturbation(self, members: Sequence[int], offsets: Sequence[torch.Tensor]) -> Perturbation:
        """Return the perturbation of the parameters at the given positions."""
        return Perturbation([self.parameters[i] for i in members], offsets, self.sites, self.in_place)

    def ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Add the ascent gradient of one micro-batch to `.grad`; return its loss."""
        try:
            return self._ascend(step, pending, closure)
        except CrossLayerDependencyError as error:
            self._stop_cutting(error, step, pending)
            return self._ascend(step, pending, closure)

    def descend(self, step: Step, pending: Pending, *, logged: bool) -> torch.Tensor:
        """Add the descent gradient of one micro-batch, at w + e, to `.grad`; return its loss.

        Args:
            step (`Step`): The step.
            pending (`Pending`): The micro-batch; where sequences of the next step ride along, they run at w.
            logged (`bool`): Whether metrics and logs count this pass.
        """
        passes = pending.passes
        if step.next_mask is not None:
            step.lone = pending
        if passes.riding is not None and self.pairs:
            try:
                loss = self._ride(step, pending, passes.riding, logged)
            except NotSeparableError as error:
                self._stop_riding(error, pending)
                logged = logged and not error.ran
            except CrossLayerDependencyError as error:
                self._stop_cutting(error, step, pending)
                return self.descend(step, pending, logged=logged)
            else:
                step.descent_loss = _added(step.descent_loss, loss)
                self._see_rode(step, passes)
                return loss
        closure = passes.logged if logged else passes.unlogged
        try:
            loss = self._descend(step, pending, closure)
        except CrossLayerDependencyError as error:
            self._stop_cutting(error, step, pending)
            loss = self._descend(step, pending, closure)
        if loss is None:
            return self._unknown()
        # A cut's sequences are in the pass that has just run: how their loss has risen costs nothing.
        if pending.whole:
            step.seen_loss = _added(step.seen_loss, loss)
        elif pending.cut is not None:
            seen = None if pending.cut.seen_in is None else pending.cut.seen_in()
            step.seen_loss = _added(step.seen_loss, torch.full_like(loss, math.nan) if seen is None else seen)
        self._see_rode(step, passes)
        step.descent_loss = _added(step.descent_loss, loss)
        return loss

    def _see_rode(self, step: Step, passes: Passes) -> None:
        """Note how the loss of the sequences has changed that made the ascent one step early."""
        if step.perturbation is not None and not step.ascents and passes.rode is not None:
            step.rode_losses = passes.rode()

    def _stop_cutting(self, error: CrossLayerDependencyError, step: Step, pending: Pending) -> None:
        """Let this pass, which has lost nothing yet, and all later ones run whole."""
        self.horizon = None
        if step.count == 1:
            self.clear()  # what a closure that accumulates gathered before the forward that raised the error
        rng.restore(pending.state)
        logger.warning("passes are not cut: %s. Every pass runs whole, and costs what that costs.", error)

    def _stop_riding(self, error: NotSeparableError, pending: Pending) -> None:
        """Let this step, of which nothing is left, and all later ones make their ascents in passes of their own."""
        self.pairs = ()
        self.clear()
        rng.restore(pending.state)
        logger.warning(
            "no sequence rides along in the pass of another batch: %s. The ascent is made in a small pass of its own, "
            "at the same count.",
            error,
        )

    def _ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        # Keep what enters the lowest active block if the descent pass may start from it.
        horizon = self._horizon(step)
        keep = (
            horizon is not None
            and pending.whole  # the sequences of a part fit no other pass
            and (pending.passes.forward_only is not None or self._is_checked(horizon, step.lowest_active))
        )
        # Else the drawn arms alone are on, and nothing below them builds a graph.
        lowest_trained, on = (step.lowest_trained, step.trained) if keep else (step.lowest_active, step.mask)
        context = horizon.truncated(step.lowest_active, lowest_trained, keep=keep) if horizon else nullcontext([])
        with context as cached_states, self.switched(on):
            loss = _loss_with_gradient(closure, step.mask)
        if loss is None:
            cached_states.clear()
            pending.idle = torch.equal(step.mask, step.trained) and pending.whole
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
        step.ascent_loss = _added(step.ascent_loss, loss)
        return loss

    def _descend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor | None:
        """Run a descent pass, a second time where a parameter turns out to be read past its module."""
        if step.ascents:
            rng.restore(pending.state)
        if pending.idle:  # there is no gradient at w + e either
            return pending.idle_loss
        perturbation = step.perturbation
        if perturbation is None:
            return self._run(step, pending, closure)
        if all(p in self.in_place or p in self._read for p in perturbation.offsets):
            with perturbation.applied():
                loss = self._run(step, pending, closure)
        else:
            with self._apart():
                loss = self._watched(step, pending, closure, perturbation)
        pending.cached_states.clear()
        return loss

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Set earlier micro-batches' gradients aside inside the context, and afterwards add to them what it made."""
        earlier = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self.clear()
        try:
            yield
        except BaseException:  # a pass that raised may be run again: nothing but the earlier ones' is left of it
            self.clear()
            for parameter, gradient in earlier:
                parameter.grad = gradient
            raise
        for parameter, gradient in earlier:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _watched(
        self, step: Step, pending: Pending, closure: Closure, perturbation: Perturbation
    ) -> torch.Tensor | None:
        """Run a descent pass and see whether every parameter was read through the swap; in place where it was not."""
        passage = perturbation.swap.passage
        passage.watch(p for p in perturbation.offsets if p not in self.in_place and p not in self._read)
        with perturbation.applied():
            loss = self._run(step, pending, closure)
        missed = passage.missed()
        self._read |= passage.read
        passage.watch(())
        return self._again_in_place(step, pending, missed) if missed else loss

    def _again_in_place(self, step: Step, pending: Pending, bypassed: Sequence[nn.Parameter]) -> torch.Tensor | None:
        """Move parameters in place that are not read by their modules, and run the pass again."""
        assert step.perturbation is not None
        together = {site.parameter for p in bypassed for site in self.sites[p]}
        self.in_place |= {*bypassed, *(together & set(self.parameters))}
        self.clear()
        rng.restore(pending.state)
        with step.perturbation.applied():
            return self._run(step, pending, pending.passes.unlogged)

    def _run(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor | None:
        """Run a descent pass at the weights as they are, from the cache where there is one."""
        horizon = self._horizon(step)
        if horizon is None:
            context = nullcontext()
        elif pending.cached_states:
            context = horizon.resumed(step.lowest_active, step.lowest_trained, pending.cached_states)
        else:
            context = self._uncut(step)
        with context:
            loss = _loss_with_gradient(closure, step.trained)
        loss = self._idle_loss(step, pending, closure) if loss is None else loss
        self.clear(~step.trained)
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
        of_cut = pending.cut is not None and closure is pending.cut.run
        forward_only = pending.cut.forward_only if of_cut else pending.passes.forward_only  # type: ignore[union-attr]
        return None if forward_only is None else _loss(forward_only())

    def _unknown(self) -> torch.Tensor:
        return torch.full((), math.nan, device=self.parameters[0].device)

    def _check_replay(self, pending: Pending, closure: Closure, loss: torch.Tensor) -> None:
        """Check, once and where a pass changes buffers, that it does so again from the same random state.

        Raises:
            ValueError: it does not: what the second pass of a step would see is other noise than the first one's.
        """
        buffers = self.accelerators.buffers
        if buffers.settled or loss.is_meta or not pending.whole:
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

    def _ride(self, step: Step, pending: Pending, riding: Riding, logged: bool) -> torch.Tensor:
        """Run a pass at w + e on own tokens and, for the next step's ascent, at w on those that ride along."""
        if step.ascents:
            rng.restore(pending.state)
        offsets = {} if step.perturbation is None else step.perturbation.offsets
        if not self._separate:
            self._check_separate(riding, offsets)
        wanted = range(len(self.parameters)) if step.next_mask is None else self.members(step.next_mask)
        stack = Stack(self.pairs, offsets, riding.own, [self.parameters[i] for i in wanted])
        if not self._ridden:
            stack.passage.watch(p for pair in self.pairs for p in pair.weights)
        with stack.applied(), self._uncut(step):
            loss = _loss(riding.logged() if logged else riding.unlogged())
        if stack.passage.missed():
            raise NotSeparableError("an adapter's weight was used outside its module", ran=True)
        self._ridden = True
        self.clear(~step.trained)
        found = {i: stack.riding[p] for i in wanted if (p := self.parameters[i]) in stack.riding}
        # What the trainer divides by is this step's; the ascent wants the mean loss of the sequences themselves.
        divisor = step.count if pending.passes.divisor is None else pending.passes.divisor
        factor = quotient(divisor, riding.items, next(iter(found.values()))) if found else loss
        step.riding = dict(zip(found, torch._foreach_mul(list(found.values()), factor), strict=True)) if found else {}
        return loss

    def _check_separate(self, riding: Riding, offsets: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Check once that neither own nor riding tokens notice at which weights the others run.

        Raises:
            NotSeparableError: they do: something in the model looks across sequences, or lays tokens out otherwise.
        """
        after = rng.snapshot(self.accelerators)
        losses = []
        for disturbed in (None, Stack.RIDING, Stack.OWN):
            stack = Stack(self.pairs, offsets, riding.own, everywhere=True)
            if disturbed is not None:
                stack.disturb(disturbed)
            rng.restore(after)
            with stack.applied():
                losses.append(riding.both_losses().detach())
        rng.restore(after)
        seen = torch.stack([losses[1][0], losses[2][1]])
        if not seen.is_meta and not bool(torch.isfinite(losses[0]).all()):
            return  # nothing can be seen of a step that is void: the next one is looked at
        if not seen.is_meta and not torch.allclose(seen, losses[0], rtol=SEPARATE_RTOL, atol=0.0):
            raise NotSeparableError(
                "the loss of some tokens of a batch depends on the weights that the others run at "
                f"({seen.tolist()} instead of {losses[0].tolist()})"
            )
        self._separate = True

    def _uncut(self, step: Step) -> AbstractContextManager[Any]:
        """Return the context of a pass over all that is trained: its backward stops where nothing below is."""
        horizon = self._horizon(step)
        if horizon is None:
            return nullcontext()
        return horizon.truncated(max(step.lowest_trained, 0), step.lowest_trained, keep=False)

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
