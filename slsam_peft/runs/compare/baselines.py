"""Baselines are cheap changes to training that somebody may try instead of SL-SAM, or beside it.

This module says which there are and imports no torch; `remedies` carries them out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from slsam_peft.names import check_name

AVERAGES = ("mean", "ema")
OF_TRAINING = ("lora_dropout", "lora_r", "weight_decay")  # fields of `TrainingSettings` that they stand in for
ALONE = ("trim", "loraplus_ratio")  # what is built for plain LoRA's trainer alone


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline, or several at once. What is unset stays as it is for all methods.

    Args:
        lora_dropout (`float`, *optional*): Dropout on the adapters' input, in [0, 1).
        lora_r (`int`, *optional*): Rank of the adapters.
        weight_decay (`float`, *optional*): Weight decay of AdamW, which pulls A and B toward 0.
        neftune_noise_alpha (`float`, *optional*): Uniform noise on the embeddings (NEFTune, arXiv 2310.05914), by
            transformers' own switch.
        label_smoothing (`float`, *optional*): Share of the target that is spread over all tokens, in (0, 1), by
            transformers' own switch and TRL's `loss_type="nll"`.
        dft (`bool`, *optional*): Weigh a token by its own probability (DFT, arXiv 2508.05629), by TRL's
            `loss_type="dft"`.
        loraplus_ratio (`float`, *optional*): Learning rate of B as a multiple of A's (LoRA+, arXiv 2402.12354), by
            PEFT's `create_loraplus_optimizer`.
        average (`str`, *optional*): Take an average of the adapter's weights in the end: `"mean"` over the last half
            of the steps, or `"ema"`, exponential with `ema_decay`.
        ema_decay (`float`, *optional*): In (0, 1); belongs to `average="ema"` and is 0.95 there where it is unset.
        stop_on_validation (`bool`, *optional*): Score the validation split eight times in training and keep the best.
            That split's answers are clean, so this is what somebody with clean held-out rows can have. Learning rates
            are chosen by the same rows, as their best loss of the eight, which favours large ones.
        trim (`float`, *optional*): After the first epoch leave out this share of the rows, in (0, 1): those of the
            largest loss.
        scale_adapter (`bool`, *optional*): Scale the product B A in the end by the factor of 0.3, 0.5, 0.7, 0.85 and 1
            that is best on the validation split, which learning rates are then chosen by as well.
    """

    lora_dropout: float | None = None
    lora_r: int | None = None
    weight_decay: float | None = None
    neftune_noise_alpha: float | None = None
    label_smoothing: float | None = None
    dft: bool | None = None
    loraplus_ratio: float | None = None
    average: str | None = None
    ema_decay: float | None = None
    stop_on_validation: bool | None = None
    trim: float | None = None
    scale_adapter: bool | None = None

    @classmethod
    def from_mapping(cls, values: Any) -> "Baseline":
        """Return the baseline that a mapping stands for.

        Raises:
            ValueError: an unknown name, or a value that is not allowed.
        """
        if not isinstance(values, Mapping) or not values:
            raise ValueError(f"baselines: {values!r} is not allowed; each is a mapping such as {{lora_dropout: 0.1}}.")
        for name in values:
            check_name("baseline", name, tuple(f.name for f in fields(cls)))
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("lora_dropout", "label_smoothing", "ema_decay", "trim"):
            _check_number(name, getattr(self, name), below=1.0)
        for name in ("weight_decay", "neftune_noise_alpha", "loraplus_ratio"):
            _check_number(name, getattr(self, name), below=math.inf)
        if self.lora_r is not None and (type(self.lora_r) is not int or self.lora_r < 1):
            raise ValueError(f"baselines: lora_r={self.lora_r!r} is not allowed; it must be an integer >= 1.")
        for name in ("dft", "stop_on_validation", "scale_adapter"):
            if getattr(self, name) not in (None, True):
                raise ValueError(f"baselines: {name}={getattr(self, name)!r} is not allowed; it is true or left out.")
        if self.average is not None:
            check_name("average", self.average, AVERAGES)
        if self.ema_decay is not None and self.average != "ema":
            raise ValueError(f"baselines: ema_decay={self.ema_decay!r} belongs to average: ema.")
        if self.label_smoothing is not None and self.dft:
            raise ValueError("baselines: label_smoothing and dft are both losses; leave one of them out.")

    @property
    def given(self) -> dict[str, Any]:
        """What is set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def of_training(self) -> dict[str, Any]:
        """What stands in for settings that all methods share."""
        return {name: value for name, value in self.given.items() if name in OF_TRAINING}

    @property
    def beside_training(self) -> dict[str, Any]:
        """What is set and no setting of all methods."""
        return {name: value for name, value in self.given.items() if name not in OF_TRAINING}

    def is_of(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a run has this baseline.

        Args:
            settings (`dict`): `Job.settings`, or a row's.
        """
        training = settings["training"]
        return self.beside_training == settings.get("baseline", {}) and all(
            training[name] == value for name, value in self.of_training.items()
        )

    @property
    def shown(self) -> str:
        """What is set, as text."""
        return ", ".join(name if value is True else f"{name} {value}" for name, value in self.given.items())


def _check_number(name: str, value: Any, below: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < below:
        end = "" if math.isinf(below) else f" and < {below:g}"
        raise ValueError(f"baselines: {name}={value!r} is not allowed; it must be a number > 0{end}.")
