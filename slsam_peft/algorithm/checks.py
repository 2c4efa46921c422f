"""Checks once, in a pass to spare, what later passes rest on: the replay, the hidden-state cache, separate tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.buffers import Buffers
from slsam_peft.algorithm.horizon import Horizon
from slsam_peft.algorithm.stack import NotSeparableError, Pair, Stack
from slsam_peft.algorithm.step import Closure, Pending, Riding, Step, loss_of

# Loss with and without the cache; the same kernels give the same bits, others round otherwise.
REUSE_RTOL = {torch.float64: 1e-12}
REUSE_RTOL_ELSE = 1e-5
SEPARATE_RTOL = 1e-5  # loss of own tokens beside riding ones at two weights: the same kernels on the same numbers


class Checks:
    """The checks of one training, each made once. They leave gradients and generators as they find them.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
        sources (`rng.Sources`): What the noise of the passes comes from.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sources: rng.Sources) -> None:
        self._parameters = parameters
        self._sources = sources
        self._checked: dict[Horizon, set[int]] = {}
        self._separate = False

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Set gradients and the random state aside inside the context."""
        gradients = [(p, p.grad) for p in self._parameters]
        after = rng.snapshot(self._sources)
        for parameter in self._parameters:
            parameter.grad = None
        try:
            yield
        finally:
            rng.restore(after)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def replay(self, pending: Pending, closure: Closure, loss: torch.Tensor) -> None:
        """Check, where a pass changes buffers, that it does so again from the same random state.

        Args:
            pending (`Pending`): The micro-batch whose ascent pass has just run.
            closure (`Closure`): That pass.
            loss (`torch.Tensor`): What it returned.

        Raises:
            ValueError: it does not: what the second pass of a step would see is other noise than the first one's.
        """
        buffers = self._sources.buffers
        if buffers.settled or loss.is_meta:
            return
        buffers.settled = True
        changed = buffers.changed(pending.state[Buffers][1])
        if not changed:
            return
        first = [None if b.now is None else b.now.detach().clone() for b in changed]
        with self._aside():
            rng.restore(pending.state)
            again = pending.forward_only or (pending.passes.unlogged if closure is pending.passes.logged else closure)
            again()
            seen = [(b, f) for b, f in zip(changed, first, strict=True) if not _only_tracks(b.module)]
            other = [b.name for b, f in seen if not _close(b.now, f)]
        if other:
            raise ValueError(
                f"{other[0]}{f' and {len(other) - 1} buffers more' if len(other) > 1 else ''} change in each forward "
                "pass by noise that torch's, Python's and NumPy's generators do not make, so the second pass of a "
                "step would see other noise than the first. Use another adapter, turn that noise off, or set rho=0."
            )

    def separate(self, pairs: Sequence[Pair], riding: Riding, offsets: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Check that neither own nor riding tokens notice at which weights the others run.

        Args:
            pairs (`Sequence[Pair]`): The low-rank pairs.
            riding (`Riding`): The micro-batch with sequences of the next step.
            offsets (`Mapping[nn.Parameter, torch.Tensor]`): e, for what is perturbed.

        Raises:
            NotSeparableError: they do: something in the model looks across sequences, or lays tokens out otherwise.
        """
        if self._separate:
            return
        after = rng.snapshot(self._sources)
        losses = []
        for disturbed in (None, Stack.RIDING, Stack.OWN):
            stack = Stack(pairs, offsets, riding.own, everywhere=True)
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

    def is_reusable(self, horizon: Horizon, lowest_active: int) -> bool:
        """Whether the cache has been checked: at this very block where more may leave the blocks, else at any."""
        checked = self._checked.setdefault(horizon, set())
        anywhere = bool(checked) and not horizon.shares and lowest_active - horizon.offset < len(horizon.blocks)
        return lowest_active in checked or anywhere

    def reuse(self, horizon: Horizon, step: Step, pending: Pending, loss: torch.Tensor) -> None:
        """Check, once or once per block, that the stack from there on depends on the cached hidden state alone.

        The pass is run again at w from the cached hidden state and must give the loss of the first pass. A stack with
        another cross-layer dependency (keys and values shared across layers, router losses) fails, and the cache is
        turned off.

        Args:
            horizon (`Horizon`): Holds the stack.
            step (`Step`): The step.
            pending (`Pending`): The micro-batch whose ascent pass has just run.
            loss (`torch.Tensor`): What it returned.
        """
        forward_only = pending.passes.forward_only
        if forward_only is None or self.is_reusable(horizon, step.lowest_active):
            return
        if not any(cached.hidden is not None for cached in pending.cached_states):
            return
        if loss.is_meta:  # no values to compare
            self._checked[horizon].add(step.lowest_active)
            return
        lowest = step.lowest_active - horizon.offset
        try:
            with self._aside():
                rng.restore(pending.state)
                whole = max(lowest, step.lowest_trained - horizon.offset)
                with horizon.resumed(lowest, whole, pending.cached_states), horizon.noting_kept(lowest):
                    again = loss_of(forward_only())
            same = torch.allclose(again, loss, rtol=REUSE_RTOL.get(loss.dtype, REUSE_RTOL_ELSE), atol=0.0)
            reason = f"the loss was {float(again)!r} instead of {float(loss)!r}"
        except Exception as error:  # noqa: BLE001 - such a stack may fail in any way; the plain pass has just run
            same, reason = False, f"it raised {type(error).__name__}: {error}"
        self._checked[horizon].add(step.lowest_active)
        if not same:
            pending.cached_states = []
            horizon.stop_reuse(
                lowest,
                f"started from the hidden state that enters block {step.lowest_active}, {reason}, so the blocks pass "
                "on more than a hidden state",
            )


def _only_tracks(module: nn.Module) -> bool:
    """Whether a module's buffers are not read by its passes: batch norm in training, recomputed by checkpointing."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.training


def _close(now: torch.Tensor | None, before: torch.Tensor | None) -> bool:
    """Whether two passes left the same in a buffer."""
    if now is None or before is None:
        return now is before
    tolerance = REUSE_RTOL.get(before.dtype, REUSE_RTOL_ELSE)
    return now.shape == before.shape and torch.allclose(now, before, rtol=tolerance, atol=tolerance, equal_nan=True)
