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


def check_rates(optimizer: Any) -> None:
    """Refuse an optimizer whose learning rates no rule can be told; before training, where one moves by them.

    Raises:
        ValueError: it makes its own in each step. The message says how it is known, and what to use.
    """
    for group in optimizer.param_groups:
        _rate_of(group, optimizer)


def _rate_of(group: Mapping[str, Any], optimizer: Any) -> float:
    rate, how = group.get("lr"), _made_by(group)
    if how is not None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        raise ValueError(
            f"{type(inner).__name__} makes its own learning rate in each step (lr={rate}, {how}), and ascent='sampa', "
            "'bar', 'obar' and 'bi_lora' move by the rate of the step that comes; set lr on an optimizer that steps "
            "by it (AdamW, SGD; Adafactor with relative_step=False), or use another rule."
        )
    return float(rate)  # type: ignore[arg-type]  # a number, or a tensor of one


def _made_by(group: Mapping[str, Any]) -> str | None:
    """Return what shows that an optimizer makes its own rate; `None` where `lr` is the rate it steps with.

    Prodigy and D-Adaptation multiply `lr` by `d`, which they estimate anew within the step itself, and some divide it
    again (DAdaptSGD, by the first gradient's norm): what they hold before a step does not tell its rate.
    """
    if group.get("lr") is None or group.get("relative_step"):  # Adafactor's: whatever lr says, it is not read
        return f"relative_step={group.get('relative_step', False)}"
    return f"d={float(group['d']):.3g}, an estimate that lr is multiplied by" if "d" in group else None
