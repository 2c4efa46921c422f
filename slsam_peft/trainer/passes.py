"""Makes the passes that the algorithm runs out of a trainer's own `training_step`.

Batch -> the sequences that make its ascent, and those of the next batch that ride along -> passes over them. A pass
takes a fresh dictionary, since the trainer's loss may take entries out of the one it is given.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from trl import DPOTrainer, RewardTrainer

from slsam_peft.algorithm.ascents import Ascent
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.passes import NOT_RIDING, SMALL_PASS
from slsam_peft.algorithm.stack import NotSeparableError
from slsam_peft.algorithm.step import Cut, Passes, Riding
from slsam_peft.trainer.cutting import (
    CannotCutError,
    ImageCounts,
    count_sequences,
    coupled,
    first_sequences,
)
from slsam_peft.trainer.divisor import Divisor
from slsam_peft.trainer.joining import CannotJoinError, Joined, join
from slsam_peft.trainer.muting import forward_only, muted
from slsam_peft.trainer.riding import has_own_loss, overrides_loss
from slsam_peft.trainer.token_losses import TokenLosses

Batch = Mapping[str, Any]

SAME_LOSS = 1e-2  # relative: bfloat16 rounds to 4e-3; another loss is farther away


class TrainerPasses:
    """The ways to run a trainer's `training_step` on a micro-batch.

    Args:
        trainer (`Trainer`): The trainer.
        step (callable): Its `training_step`, without the algorithm: `(model, inputs, num_items)` -> loss.
        ascent (`Ascent`): Says which sequences are needed.
        losses (`TokenLosses` or `None`): Of the trainer's passes, where its loss is a sum over tokens.
        fallbacks (`Fallbacks`): Told of batches whose sequences cannot be told apart or joined.

    Attributes:
        joined (`Joined` or `None`): The last micro-batch with what rides along in it.
    """

    def __init__(
        self,
        trainer: Any,
        step: Callable[..., torch.Tensor],
        ascent: Ascent,
        losses: TokenLosses | None,
        fallbacks: Fallbacks,
    ) -> None:
        self.trainer = trainer
        self.step = step
        self.ascent = ascent
        self.losses = losses
        self.fallbacks = fallbacks
        self.stacked = 2 if isinstance(trainer, DPOTrainer | RewardTrainer) else 1  # chosen rows above rejected ones
        config = getattr(trainer.model, "config", None)
        self.images = None if config is None else ImageCounts.of(config)
        self.whole = coupled(trainer)
        self.own_loss = has_own_loss(trainer) and not overrides_loss(trainer)
        self.divisor = Divisor(trainer, own_loss=self.own_loss, needed=not ascent.exact)
        self.joined: Joined | None = None
        self._rode: Callable[[], tuple[torch.Tensor, torch.Tensor] | None] | None = None  # of the step before
        self._counted_early = 0  # tokens of the next batch, of this rank, that TRL has counted in this one's pass

    def of(self, model: nn.Module, inputs: Batch, num_items: Any, coming: Batch | None) -> Passes:
        """Return the passes over a micro-batch.

        Args:
            model (`nn.Module`): What the trainer hands to `training_step`.
            inputs (`Mapping`): The micro-batch.
            num_items (`torch.Tensor`, `int` or `None`): What the trainer divides by.
            coming (`Mapping` or `None`): The next batch, where some of its sequences may ride along.
        """

        def run(batch: Batch, count: Any = num_items) -> torch.Tensor:
            with nullcontext() if self.losses is None else self.losses.looked_at():
                return self.step(model, dict(batch), count)

        def quiet(batch: Batch, count: Any = num_items) -> torch.Tensor:
            with muted(self.trainer):
                return run(batch, count)

        def forward(batch: Batch, count: Any = num_items) -> torch.Tensor:
            with muted(self.trainer), forward_only(self.trainer):
                return run(batch, count)

        rode, self._rode = self._rode, None
        self.divisor.find_out(model, lambda count: forward(inputs, count), num_items)
        divisor, items = self.divisor.units(inputs, num_items)
        self.joined = None
        sequences = self._count(inputs) if self.ascent.cuts else None
        return Passes(
            logged=lambda: run(inputs),
            unlogged=lambda: quiet(inputs),
            forward_only=lambda: forward(inputs),
            sequences=sequences,
            cut=None if sequences is None else lambda wanted: self._cut(inputs, wanted, quiet, forward, num_items),
            items=items,
            divisor=divisor,
            riding=None if coming is None else self._riding(inputs, coming, run, quiet, forward, num_items),
            rode=rode,
            whole=sequences is None,
        )

    def _count(self, inputs: Batch) -> int | None:
        """Return how many sequences a micro-batch has; `None`, said once, where they cannot be told apart."""
        if self.whole is None:
            try:
                return count_sequences(inputs, self.stacked)
            except CannotCutError as error:
                reason = str(error)
        else:
            reason = self.whole
        self._take_whole(reason)
        return None

    def _cut(self, inputs: Batch, wanted: int, quiet: Any, forward: Any, num_items: Any) -> Cut:
        """Return an ascent pass over the first sequences of a micro-batch; over all where they cannot be cut off."""
        try:
            cut = first_sequences(inputs, wanted, self.stacked, self.images).inputs
        except CannotCutError as error:
            self._take_whole(error)
            cut = dict(inputs)

        def seen_in() -> torch.Tensor | None:
            return self._loss_of(_first_tokens(inputs, cut), num_items) if self.own_loss else None

        if self.divisor.has_router_loss(num_items):
            count, items = self.divisor.of_a_part(cut, num_items)
            return Cut(lambda: quiet(cut, count), items, lambda: forward(cut, count))
        return Cut(lambda: quiet(cut), self.divisor.units(cut, num_items)[1], lambda: forward(cut), seen_in)

    def _loss_of(self, tokens: torch.Tensor | None, num_items: Any) -> torch.Tensor | None:
        if self.losses is None or tokens is None or num_items is None:
            return None
        loss = self.losses.of(tokens)
        # Clamped as TRL does: a batch that teaches nothing has a loss of 0.
        return None if loss is None else loss * self.divisor.ranks / torch.as_tensor(num_items).clamp(min=1)

    def _riding(
        self, inputs: Batch, coming: Batch, run: Any, quiet: Any, forward: Any, num_items: Any
    ) -> Riding | None:
        """Return the pass over a micro-batch and sequences of the next one; `None`, said once, where it cannot be."""
        try:
            wanted = self.ascent.riding(count_sequences(coming))
            joined = self.joined = join(inputs, coming, wanted)
        except (CannotCutError, CannotJoinError) as error:
            self.fallbacks.add(NOT_RIDING, error, SMALL_PASS)
            return None
        assert self.losses is not None
        losses = self.losses

        def logged() -> torch.Tensor:
            with losses.only(joined.own):
                run(joined.inputs)
            self._counted_early = joined.tokens
            return own_loss()

        def unlogged() -> torch.Tensor:
            quiet(joined.inputs)
            return own_loss()

        def own_loss() -> torch.Tensor:
            self._rode = self._watched(joined)
            return _known(self._loss_of(joined.own, num_items))

        def both() -> torch.Tensor:
            loss = forward(joined.inputs)
            if not torch.isclose(
                _known(self._loss_of(torch.ones_like(joined.own), num_items)), loss, SAME_LOSS, equal_nan=True
            ):
                raise NotSeparableError("the trainer's loss is not the sum of its tokens' losses (compute_loss)")
            return torch.stack([_known(losses.of(joined.own)), _known(losses.of(~joined.own))])

        return Riding(logged, unlogged, both, joined.own, joined.riding_items.clamp(min=1))

    def _watched(self, joined: Joined) -> Callable[[], tuple[torch.Tensor, torch.Tensor] | None]:
        """Return what tells, one step later, the loss of the sequences that ride along now, and what it is now."""
        losses = self.losses
        assert losses is not None
        items, before = joined.riding_items.clamp(min=1), losses.of(~joined.own)

        def rode() -> tuple[torch.Tensor, torch.Tensor] | None:
            after = losses.of(joined.which)
            return None if after is None or before is None else (after / items, before / items)

        return rode

    def uncount_riding(self, *, on_all_ranks: bool) -> None:
        """Take the next batch's tokens off TRL's count of those trained on, once a step: theirs is still to come.

        Args:
            on_all_ranks (`bool`): Whether every rank comes here in this step, though on some nothing may have ridden
                along: TRL counts the tokens of all of them, and so does this.
        """
        tokens, self._counted_early = self._counted_early, 0
        if on_all_ranks:
            accelerator = self.trainer.accelerator
            tokens = int(accelerator.gather(torch.tensor(tokens, device=accelerator.device)).sum())
        if tokens:
            self.trainer._total_train_tokens -= tokens
            self.trainer._metrics["train"]["num_tokens"] = [self.trainer._total_train_tokens]

    def _take_whole(self, why: object) -> None:
        self.fallbacks.add(
            "the ascent takes a whole micro-batch",
            why,
            "It costs as much as the batch has: with a single micro-batch a step is 2 plain ones.",
        )


def _known(loss: torch.Tensor | None) -> torch.Tensor:
    """Return a loss of some tokens of a pass.

    Raises:
        NotSeparableError: it is not known, since the model's output does not show the loss token by token.
    """
    if loss is None:
        raise NotSeparableError("the model does not return its loss token by token")
    return loss


def _first_tokens(inputs: Batch, cut: Batch) -> torch.Tensor | None:
    """Return which tokens of a batch its cut holds, boolean, shape `(batch, length)`; `None` where it is not seen."""
    whole, part = inputs.get("labels"), cut.get("labels")
    if whole is None or part is None or whole.dim() != 2:
        return None
    if part.shape[1] == whole.shape[1]:
        rows = torch.arange(len(whole), device=whole.device)
        return (rows < len(part))[:, None].expand(whole.shape)
    if len(whole) == 1 and len(part) == 1:
        return torch.arange(whole.shape[1], device=whole.device)[None] < part.shape[1]
    return None
