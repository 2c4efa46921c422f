"""Runs a step's passes over its micro-batches: what is on, at which weights, where they are cut, what is replayed."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.checks import Checks
from slsam_peft.algorithm.cut_pass import CachedHiddenState
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.horizon import Horizon
from slsam_peft.algorithm.horizons import Horizons
from slsam_peft.algorithm.leaks import CrossLayerDependencyError
from slsam_peft.algorithm.parameters import ArmParameters
from slsam_peft.algorithm.perturbation import Perturbation
from slsam_peft.algorithm.radius import scaled
from slsam_peft.algorithm.shards import Shards
from slsam_peft.algorithm.stack import NotSeparableError, Pair, Stack
from slsam_peft.algorithm.step import Closure, Passes, Pending, Riding, Step, added, loss_of, quotient
from slsam_peft.algorithm.swap import Sites
from slsam_peft.algorithm.switching import switched_off

NOT_RIDING = "no sequence rides along in the pass of another batch"
SMALL_PASS = "The ascent is made in a small pass of its own: the same count, a few more launches."
NO_GRADIENT = (
    "does not require grad and does not have a grad_fn"  # torch, of a loss that nothing trained had a part in
)


def _loss_with_gradient(closure: Closure, on: torch.Tensor) -> torch.Tensor | None:
    """Run a closure and return its loss; `None` where none of the arms that are on, not all there are, took part."""
    try:
        return loss_of(closure())
    except RuntimeError as error:
        if NO_GRADIENT not in str(error) or bool(on.all()):
            raise
        return None


class PassRunner(ArmParameters):
    """Runs ascent and descent passes with the arms of a step switched on.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
        owner (`torch.Tensor`): Arm index of each, shape `(P,)`.
        sites (`Sites`): For each where modules read it; those without a place are moved in place.
        horizon (`Horizons` or `None`): Cuts the passes; `None` runs them whole.
        fallbacks (`Fallbacks`): Told of what runs otherwise than meant.
        pairs (`Sequence[Pair]`, *optional*, defaults to `()`): The low-rank pairs that hold all parameters, where
            sequences of the next step may ride along.
        buffered (`Mapping[str, nn.Module]`, *optional*): Modules, by name, whose buffers a second pass must find as
            the first one did.
        shards (`Shards`, *optional*): The sharded ones among the parameters; then all are moved in place, and none is
            switched off.
        devices (`Iterable[torch.device]`, *optional*, defaults to `()`): Where the model lies, beside these
            parameters.

    Attributes:
        in_place (`set[nn.Parameter]`): Parameters that are moved in place, since a pass read them past their modules.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        owner: torch.Tensor,
        sites: Sites,
        horizon: Horizons | None,
        fallbacks: Fallbacks,
        pairs: Sequence[Pair] = (),
        buffered: Mapping[str, nn.Module] | None = None,
        shards: Shards | None = None,
        devices: Iterable[torch.device] = (),
    ) -> None:
        super().__init__(parameters, owner)
        self.sites = sites
        self.horizon = horizon
        self.fallbacks = fallbacks
        self.pairs = tuple(pairs)
        self.shards = shards
        self.in_place = {p for p in parameters if shards is not None or not sites.get(p)}
        self.accelerators = rng.sources_of(parameters, buffered, devices)
        self._read: set[nn.Parameter] = set()  # seen to be read by their modules
        self._checks = Checks(parameters, self.accelerators)
        self._ridden = False
        self._idle = False

    def switched(self, trained: torch.Tensor) -> AbstractContextManager[None]:
        """Switch the arms that are not trained off inside the context, and what was off already stays off."""
        if self.shards is not None:  # gathered copies would have to follow; their gradients are dropped
            return nullcontext()
        return switched_off((self.parameters[i] for i in self.members(~trained)), self.parameters)

    def perturbation(self, members: Sequence[int], offsets: Sequence[torch.Tensor]) -> Perturbation:
        """Return the perturbation of the parameters at the given positions."""
        self._tell_in_place(sum(self.parameters[i] in self.in_place for i in members))
        changed = None if self.shards is None else self.shards.release
        return Perturbation([self.parameters[i] for i in members], offsets, self.sites, self.in_place, changed)

    def _tell_in_place(self, written: int) -> None:
        if written:
            self.fallbacks.add(
                "some weights are perturbed in place",
                f"{written} of them are read past their modules (a fused kernel, a list that a module keeps)",
                "They are copied before each second pass and put back bit for bit: the memory of one copy.",
            )

    def ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        """Add the ascent gradient of one micro-batch to `.grad`; return its loss."""
        try:
            return self._ascend(step, pending, closure)
        except CrossLayerDependencyError as error:
            self._stop_cutting(error, step, pending)
            return self._ascend(step, pending, closure)

    def probe(
        self, pending: Pending, forward: Closure, members: Sequence[int], offsets: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss of a forward pass alone at w + e, from the random state that the micro-batch started from.

        What has not been seen to be read by its module is moved in place: a forward pass cannot tell.

        Args:
            pending (`Pending`): The micro-batch.
            forward (`Closure`): The forward alone.
            members (`Sequence[int]`): Positions of the parameters that move.
            offsets (`Sequence[torch.Tensor]`): e, one for each of them.
        """
        rng.restore(pending.state)
        parameters = [self.parameters[i] for i in members]
        bypassed = self.in_place | (set(parameters) - self._read)
        with Perturbation(parameters, offsets, self.sites, bypassed).applied(), torch.no_grad():
            return loss_of(forward())

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
                step.descent_loss = added(step.descent_loss, loss)
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
            step.seen_loss = added(step.seen_loss, loss)
        elif pending.cut is not None:
            seen = None if pending.cut.seen_in is None else pending.cut.seen_in()
            step.seen_loss = added(step.seen_loss, torch.full_like(loss, math.nan) if seen is None else seen)
        self._see_rode(step, passes)
        step.descent_loss = added(step.descent_loss, loss)
        return loss

    def _see_rode(self, step: Step, passes: Passes) -> None:
        """Note how the loss of the sequences has changed that made the ascent one step early."""
        if step.perturbation is not None and not step.ascents and passes.rode is not None:
            step.rode_losses = passes.rode()

    def _stop_cutting(self, error: CrossLayerDependencyError, step: Step, pending: Pending) -> None:
        """Let this pass, which has lost nothing yet, and all later ones that are cut in the same stacks run whole."""
        stopped = [h for h in (self._horizon(step), self._horizon_of_trained(step)) if h is not None]
        if self.horizon is not None:
            self.horizon.stop(stopped)
            self.horizon = self.horizon if self.horizon.stacks else None
        if step.count == 1:
            self.clear()  # what a closure that accumulates gathered before the forward that raised the error
        rng.restore(pending.state)
        names = ", ".join(dict.fromkeys(h.name for h in stopped if h.name))
        self.fallbacks.add(
            f"passes are not cut{f' in {names}' if names else ''}",
            error,
            "Every pass runs whole, and costs what that costs: a step of two passes 2 plain ones.",
        )

    def _stop_riding(self, error: NotSeparableError, pending: Pending) -> None:
        """Let this step, of which nothing is left, and all later ones make their ascents in passes of their own."""
        self.pairs = ()
        self.clear()
        rng.restore(pending.state)
        self.fallbacks.add(NOT_RIDING, error, SMALL_PASS)

    def _ascend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor:
        # Keep what enters the lowest active block if the descent pass may start from it.
        horizon = self._horizon(step)
        keep = (
            horizon is not None
            and pending.whole  # the sequences of a part fit no other pass
            and step.lowest_active - horizon.offset not in horizon.whole
            and (pending.passes.forward_only is not None or self._checks.is_reusable(horizon, step.lowest_active))
        )
        # Else the drawn arms alone are on, and nothing below them builds a graph.
        lowest_trained, on = (step.lowest_trained, step.trained) if keep else (step.lowest_active, step.mask)
        context = self._truncated(horizon, step.lowest_active, lowest_trained, keep=keep)
        with context as cached_states, self.switched(on):
            loss = _loss_with_gradient(closure, step.mask)
        # Where the graph of the blocks below has been run through, no second pass can go on from it.
        if horizon is not None and cached_states and self.has_gradient(step.below):
            cached_states.clear()
            if not horizon.skipping:  # at random, which says nothing of other passes
                lowest = step.lowest_active
                why = f"what runs above block {lowest} takes in more of those below it than the hidden state"
                horizon.stop_reuse(lowest - horizon.offset, why)
        if loss is None:
            cached_states.clear()
            pending.idle = torch.equal(step.mask, step.trained) and pending.whole
            loss = pending.idle_loss = self._idle_loss(step, pending, closure)
        self.clear(~step.mask)
        if loss is None:
            return self._unknown()
        self._checks.replay(pending, closure, loss)
        # The first time, check that it does give the same loss.
        if horizon is not None and keep and cached_states:
            pending.cached_states = cached_states
            self._checks.reuse(horizon, step, pending, loss)
            step.cached += any(cached.hidden is not None for cached in pending.cached_states)
        step.ascent_loss = added(step.ascent_loss, loss)
        return loss

    def _descend(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor | None:
        """Run a descent pass, a second time where a parameter turns out to be read past its module."""
        if step.ascents:
            rng.restore(pending.state)
        if pending.idle:  # there is no gradient at w + e either
            if closure is pending.passes.logged:  # the pass that the metrics and logs count is still to come
                _loss_with_gradient(closure, step.trained)
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
        self._tell_in_place(len(self.in_place))
        self.clear()
        pending.cached_states.clear()  # what they lead to has been run through
        rng.restore(pending.state)
        with step.perturbation.applied():
            return self._run(step, pending, pending.passes.unlogged)

    def _run(self, step: Step, pending: Pending, closure: Closure) -> torch.Tensor | None:
        """Run a descent pass at the weights as they are, from the cache where there is one."""
        horizon = self._horizon(step)
        if horizon is not None and pending.cached_states:
            active, trained = (max(depth - horizon.offset, -1) for depth in (step.lowest_active, step.lowest_trained))
            context = horizon.resumed(active, trained, pending.cached_states)
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
            self.fallbacks.add(
                "steps without a gradient are skipped, and counted in slsam/skipped",
                "none of the drawn arms takes part in the loss of a batch (blocks that are skipped at random, as "
                "layerdrop does, or batches without what an arm works on), so its gradient is 0",
                "Such a step changes nothing.",
            )
        rng.restore(pending.state)
        if not torch.equal(step.mask, step.trained):  # uncut, the pass has the gradient of other arms
            return _loss_with_gradient(
                pending.passes.unlogged if closure is pending.passes.logged else closure, step.trained
            )
        of_cut = pending.cut is not None and closure is pending.cut.run
        forward_only = pending.cut.forward_only if of_cut else pending.passes.forward_only  # type: ignore[union-attr]
        return None if forward_only is None else loss_of(forward_only())

    def _unknown(self) -> torch.Tensor:
        return torch.full((), math.nan, device=self.parameters[0].device)

    def _ride(self, step: Step, pending: Pending, riding: Riding, logged: bool) -> torch.Tensor:
        """Run a pass at w + e on own tokens and, for the next step's ascent, at w on those that ride along."""
        if step.ascents:
            rng.restore(pending.state)
        offsets = {} if step.perturbation is None else step.perturbation.offsets
        self._checks.separate(self.pairs, riding, offsets)
        wanted = range(len(self.parameters)) if step.next_mask is None else self.members(step.next_mask)
        extrapolated = {self.parameters[i]: offset for i, offset in step.extrapolated.items()}
        stack = Stack(self.pairs, offsets, riding.own, [self.parameters[i] for i in wanted], extrapolated=extrapolated)
        if not self._ridden:
            stack.passage.watch(p for pair in self.pairs for p in pair.weights)
        with stack.applied(), self._uncut(step):
            loss = loss_of(riding.logged() if logged else riding.unlogged())
        if stack.passage.missed():
            raise NotSeparableError("an adapter's weight was used outside its module", ran=True)
        self._ridden = True
        self.clear(~step.trained)
        found = {i: stack.riding[p] for i in wanted if (p := self.parameters[i]) in stack.riding}
        # What the trainer divides by is this step's; the ascent wants the mean loss of the sequences themselves.
        divisor = step.count if pending.passes.divisor is None else pending.passes.divisor
        factor = quotient(divisor, riding.items, next(iter(found.values()))) if found else loss
        step.riding = dict(zip(found, scaled(list(found.values()), factor), strict=True)) if found else {}
        return loss

    def _uncut(self, step: Step) -> AbstractContextManager[Any]:
        """Return the context of a pass over all that is trained: its backward stops where nothing below is."""
        horizon = self._horizon_of_trained(step)
        return self._truncated(horizon, max(step.lowest_trained, 0), step.lowest_trained, keep=False)

    def _truncated(
        self, horizon: Horizon | None, lowest_active: int, lowest_trained: int, *, keep: bool
    ) -> AbstractContextManager[list[CachedHiddenState]]:
        """Return the context of a pass that is cut at a depth, see `Horizon.truncated`; of a whole one without one."""
        if horizon is None:
            return nullcontext([])
        return horizon.truncated(lowest_active - horizon.offset, max(lowest_trained - horizon.offset, -1), keep=keep)

    def runs_whole(self, step: Step) -> bool:
        """Whether no pass of a step is cut at its lowest active block."""
        return self._horizon(step) is None

    def _horizon(self, step: Step) -> Horizon | None:
        """Return where the passes of a step are cut that make gradients of its perturbed arms."""
        return None if self.horizon is None else self.horizon.at(step.lowest_active)

    def _horizon_of_trained(self, step: Step) -> Horizon | None:
        """Return where the passes of a step are cut that make gradients of all its trained arms."""
        if self.horizon is None or step.lowest_active < 0:
            return None
        return self.horizon.at(max(step.lowest_trained, 0))
