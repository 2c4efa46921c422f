"""Tells what a trainer's loss is divided by, so that of a part of it its own mean can be made.

A loss is a sum over items (scored tokens), divided by those of the whole step, or a mean of each micro-batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn

from slsam_peft.algorithm import rng
from slsam_peft.trainer.cutting import scored_items
from slsam_peft.trainer.documents import IGNORED

_BESIDE_TOKENS = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # keys and values, no tokens of the batch


class Divisor:
    """What the losses of a trainer are divided by.

    Args:
        trainer (`Trainer`): The trainer.
        own_loss (`bool`): Whether its loss is TRL's own for supervised fine-tuning, a sum over items.
        needed (`bool`): Whether it has to be known; a whole step is its own mean.

    Attributes:
        divides (`bool` or `None`): Whether losses are divided by the number of items that they are handed; `None`: not
            known yet.
    """

    def __init__(self, trainer: Any, *, own_loss: bool, needed: bool) -> None:
        self.trainer = trainer
        self.divides: bool | None = True if own_loss or not needed else None
        self._shifted = own_loss or getattr(trainer, "_loss_shifts_labels", True)
        self._prompted = _prepends_tokens(trainer.model)

    def find_out(self, model: nn.Module, forward: Callable[[Any], torch.Tensor], num_items: Any) -> None:
        """Find out, where it is not known, whether losses are divided by what they are handed.

        Many are handed a number of items and take a mean all the same. With twice the items the loss halves, or stays.
        The host reads both losses, once; random state and buffers are left as they are.

        Args:
            model (`nn.Module`): The model that runs.
            forward (callable): Number of items -> loss of a micro-batch, forward only and unlogged.
            num_items (`torch.Tensor`, `int` or `None`): What the trainer hands over.
        """
        if self.divides is not None or num_items is None or self._is_mean:
            return
        sources = rng.sources_of(model.parameters(), {n: m for n, m in model.named_modules() if m._buffers})
        before, losses = rng.snapshot(sources), []
        for count in (num_items, num_items * 2):
            rng.restore(before)
            losses.append(float(forward(count)))
        rng.restore(before)
        once, twice = losses
        if math.isfinite(once) and math.isfinite(twice) and once != 0.0:  # else the next micro-batch tells
            self.divides = abs(twice - once / 2) < abs(twice - once)

    def units(self, inputs: Mapping[str, Any], num_items: Any) -> tuple[Any, Any]:
        """Return what a micro-batch's loss is divided by, and how many items of that it holds itself.

        See `Passes.divisor` and `Passes.items`.
        """
        if num_items is None or self._is_mean:
            return None, 1.0  # a mean, divided by the number of micro-batches
        if self.divides is False:  # a mean of each micro-batch, and the trainer takes it for a share of the step's
            return 1.0 / self.ranks, 1.0
        return num_items / self.ranks, self.items(inputs)

    def has_router_loss(self, num_items: Any) -> bool:
        """Whether a mean over routers stands beside a sum over items in the loss."""
        sums = self.divides and num_items is not None and not self._is_mean
        return bool(sums and getattr(self.trainer, "aux_loss_enabled", False))

    def of_a_part(self, cut: Mapping[str, Any], num_items: Any) -> tuple[Any, Any]:
        """Return by how many items a part is to be divided, and for how many of the step's it counts then.

        Losses of routers are means, divided by the number of micro-batches. So that the sum is one as well, it is
        divided by the items of a step that would consist of such parts.
        """
        batches = self.trainer.current_gradient_accumulation_steps
        return self.items(cut) * batches * self.ranks, num_items / self.ranks / batches

    @property
    def ranks(self) -> int:
        """By how much the trainer multiplies a loss that it divides by the items of all ranks."""
        return self.trainer.accelerator.num_processes if self.trainer.args.average_tokens_across_devices else 1

    @property
    def _is_mean(self) -> bool:
        """Whether the trainer says that its loss is a mean, which it divides by the number of micro-batches."""
        return getattr(self.trainer, "loss_is_scaled_for_ga", None) is False

    def items(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return how many tokens of a batch are scored, at least 1, shape `()`."""
        items, labels = scored_items(inputs, shifted=self._shifted), inputs.get("labels")
        if self._prompted and labels is not None and labels.dim() > 1:
            items = items + (labels[:, 0] != IGNORED).sum()
        return items.clamp(min=1)


def _prepends_tokens(model: Any) -> bool:
    """Whether a model puts virtual tokens in front of a batch's own, so that the first of these is scored, too."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config is not None and config.is_prompt_learning and config.peft_type not in _BESIDE_TOKENS
