"""Reads the loss of some tokens out of a pass over all of them, and keeps metrics to a step's own tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class TokenLosses:
    """The losses of the last pass, token by token, as TRL's fused head returns them.

    Args:
        model (`nn.Module`): The model that the trainer calls; its outputs are looked at.
        loss_type (`str`): TRL's name of the loss: `"nll"` or `"dft"`.
    """

    def __init__(self, model: nn.Module, loss_type: str) -> None:
        self.loss_type = loss_type
        self.last: torch.Tensor | None = None
        self._first = 1  # first token of a batch that has a loss
        self._own: torch.Tensor | None = None
        self._model = model

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Look at the model's outputs inside the context."""
        handle = self._model.register_forward_hook(self._look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def only(self, own: torch.Tensor) -> Iterator[None]:
        """Let metrics count a step's own tokens alone; the loss stays that of all.

        Args:
            own (`torch.Tensor`): Which tokens these are, boolean, shape `(batch, length)`.
        """
        self._own = own[:, 1:]
        try:
            yield
        finally:
            self._own = None

    def of(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Return the summed loss of some tokens in the last pass, shape `()`; `None` where it is not known.

        Args:
            tokens (`torch.Tensor`): Which, boolean, shape `(batch, length)` of the batch that the pass ran on, or of
                the part of it that comes first in both dimensions.
        """
        scored = tokens[:, self._first :]
        if self.last is None or self.last.shape[0] < scored.shape[0] or self.last.shape[1] < scored.shape[1]:
            return None
        first = self.last[: scored.shape[0], : scored.shape[1]]
        return first.where(scored.to(first.device), 0.0).sum()

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None:
            self.last = None
            return
        # Virtual tokens of a prompt stand in front of the batch's own: they have no loss, and its first one has.
        labels = kwargs.get("labels") if kwargs.get("shift_labels") is None else None
        virtual = 0 if labels is None else max(0, log_probs.shape[1] - (labels.shape[1] - 1))
        self._first = 0 if virtual else 1
        seen = log_probs.detach()[:, max(0, virtual - 1) :]
        self.last = -seen * seen.exp() if self.loss_type == "dft" else -seen
        if self._own is not None and self._own.shape == log_probs.shape:
            own = self._own.to(log_probs.device)
            output.label_mask = output.label_mask & own
            output.entropy = output.entropy.detach().where(own, 0.0)
            output.is_top1 = output.is_top1 & own
