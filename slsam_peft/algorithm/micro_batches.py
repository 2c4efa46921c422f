"""Runs the passes of a step, micro-batch by micro-batch: ascents first, and descents once e is known."""

import torch

from slsam_peft.algorithm import rng
from slsam_peft.algorithm.ascents import Ascent, Host
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.passes import PassRunner
from slsam_peft.algorithm.perturbing import Perturber
from slsam_peft.algorithm.step import Closure, Passes, Pending, Step


class MicroBatches:
    """Decides which passes are due with each micro-batch, and runs them.

    Args:
        host (`Host`): The algorithm; whether it averages over ranks is asked of it in each step.
        runner (`PassRunner`): Runs passes.
        ascent (`Ascent`): Says how many sequences of each micro-batch it takes.
        perturber (`Perturber`): Makes e once the ascents have run.
        fallbacks (`Fallbacks`): Told of an ascent that is made by more sequences than meant.
    """

    def __init__(
        self, host: Host, runner: PassRunner, ascent: Ascent, perturber: Perturber, fallbacks: Fallbacks
    ) -> None:
        self._host = host
        self._runner = runner
        self._ascent = ascent
        self._perturber = perturber
        self._fallbacks = fallbacks

    def run(self, step: Step, passes: Passes, index: int) -> torch.Tensor:
        """Run the passes that are due with this micro-batch; return the loss to report for it."""
        pending = Pending(passes, rng.snapshot(self._runner.accelerators))
        take = 0 if step.perturbation is not None or step.given else self._take(step, passes, index)
        # Once e is known, and where there is none, there is the descent alone.
        if not take and not step.pending:
            with self._ascent.within(step):
                return self._runner.descend(step, pending, logged=True)
        # The ascent's micro-batches run at w and wait for e; so do others while it is not known.
        if take:
            loss = self._ascent.ascend(self._host, self._runner, step, pending, self._ascent_pass(step, pending, take))
            step.pending.append(pending)
            step.taken, step.ascents = step.taken + take, step.ascents + 1
        else:
            loss = torch.zeros((), device=self._runner.parameters[0].device)
            step.late.append(pending)
        step.given = step.given or index + 1 == step.count or not self._take(step, passes, index + 1)
        if not step.given or self._waits_for_ranks(index, step.count):
            return loss if self._ascent.exact else torch.zeros_like(loss)
        return self._descend_all(step, loss)

    def _waits_for_ranks(self, index: int, count: int) -> bool:
        """Whether e is not to be made yet, since another rank may have ascent passes behind this micro-batch.

        What ranks tell one another between two micro-batches would meet there what they average into e. The numbers
        of sequences of ranks with sharded parameters are agreed on.
        """
        reach = self._ascent.reach(count) if self._host.reduce is not None and self._runner.shards is None else 0
        return index + 1 < min(reach, count)

    def _descend_all(self, step: Step, loss: torch.Tensor) -> torch.Tensor:
        """Complete e, and run the descents that wait for it, each with the random state it had in its ascent.

        Args:
            step (`Step`): The step.
            loss (`torch.Tensor`): What to report where the ascents have counted in metrics and logs.
        """
        self._perturber.of_ascent(step)
        after = rng.snapshot(self._runner.accelerators)
        with self._ascent.within(step):
            losses = [self._runner.descend(step, p, logged=not self._ascent.exact) for p in step.pending]
            if all(p.whole for p in step.pending):  # a part has used fewer random numbers than its micro-batch
                rng.restore(after)
            for late in step.late:  # as if they came only now
                late.state = rng.snapshot(self._runner.accelerators)
                losses.append(self._runner.descend(step, late, logged=True))
        step.pending.clear()
        step.late.clear()
        return loss if self._ascent.exact else torch.stack(losses).sum()

    def _take(self, step: Step, passes: Passes, index: int) -> int:
        sequences, shards = passes.sequences, self._runner.shards
        if shards is not None and self._ascent.cuts:  # all ranks run the same passes
            sequences = shards.least(sequences)
        return self._ascent.take(index, step.count, sequences, step.taken)

    def _ascent_pass(self, step: Step, pending: Pending, take: int) -> Closure:
        """Return the ascent pass over so many sequences of a micro-batch: a part of it, or all."""
        passes = pending.passes
        known = passes.sequences is not None
        if not self._ascent.exact and passes.cut is not None and (take < (passes.sequences or 0) or not known):
            pending.cut = passes.cut(take)
            step.items = step.items + pending.cut.items
            return pending.cut.run
        pending.whole = True
        step.items = step.items + passes.items
        if self._ascent.exact:
            return passes.logged
        rides = bool(self._runner.pairs) and passes.riding is not None  # then this is an epoch's first step alone
        if step.count == 1 and not rides and not self._ascent.forwards:
            self._fallbacks.add(
                "the ascent is made by the whole batch",
                "it has a single sequence; with gradient accumulation one micro-batch of several makes it"
                if passes.sequences == 1
                else "no part of it can be taken (in a loop of your own, pass ascent_closure)",
                "That is a second pass: a step costs 2.0 plain ones.",
            )
        return passes.unlogged
