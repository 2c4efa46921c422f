"""Tells the learning rate of a parameter in the step in progress."""

from collections.abc import Mapping
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
        """Return the rate that the optimizer's next step has for a parameter.

        Raises:
            ValueError: the optimizer has none, since it makes its own in each step.
        """
        optimizer = self._trainer.optimizer
        now = (id(optimizer), self._trainer.state.global_step)
        if now != self._seen:
            self._rates = {p: _rate_of(group, optimizer) for group in optimizer.param_groups for p in group["params"]}
            self._seen = now
        return self._rates.get(parameter, 0.0)


def _rate_of(group: Mapping[str, Any], optimizer: Any) -> float:
    rate = group.get("lr")
    if rate is None or group.get("relative_step"):  # Adafactor's: whatever lr says, it is not read
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        raise ValueError(
            f"{type(inner).__name__} makes its own learning rate in each step (lr={rate}, "
            f"relative_step={group.get('relative_step', False)}), and ascent='sampa', 'bar', 'obar' and 'bi_lora' "
            "move weights by it; set lr, for Adafactor with relative_step=False, or use another rule."
        )
    return float(rate)
