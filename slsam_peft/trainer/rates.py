"""Tells the learning rate of a parameter in the step in progress."""

from typing import Any

from torch import nn


class LearningRates:
    """The learning rates of a trainer's optimizer, by parameter; 0 for what it does not hold.

    Args:
        trainer (`Trainer`): Its optimizer and its scheduler may be made later.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seen: tuple[int, int] | None = None
        self._rates: dict[nn.Parameter, float] = {}

    def __call__(self, parameter: nn.Parameter) -> float:
        """Return the rate that the optimizer's next step has for a parameter."""
        optimizer = self._trainer.optimizer
        now = (id(optimizer), self._trainer.state.global_step)
        if now != self._seen:
            self._rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
            self._seen = now
        return self._rates.get(parameter, 0.0)
