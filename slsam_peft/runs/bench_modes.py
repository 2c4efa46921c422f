"""Lists the modes that `slsam-peft bench` times. Nothing here imports torch, so that the help can name them."""

from collections.abc import Sequence
from dataclasses import dataclass

from slsam_peft.config import SLSAMConfig, hint_at
from slsam_peft.errors import UserError


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Args:
        config (`SLSAMConfig`, *optional*): Settings of SL-SAM; plain `SFTTrainer` without.
        accumulated (`bool`, *optional*, defaults to `False`): Whether the sequences of a step come one at a time, in
            micro-batches of one.
    """

    config: SLSAMConfig | None = None
    accumulated: bool = False


# All on the same sequences per step. The radius does not change the cost.
MODES = {
    "plain LoRA": Mode(),
    "auto": Mode(SLSAMConfig()),
    "auto, small pass": Mode(SLSAMConfig(method="auto", ascent="partial")),
    "plain LoRA, accumulated": Mode(accumulated=True),
    "auto, accumulated": Mode(SLSAMConfig(), accumulated=True),
    "sam": Mode(SLSAMConfig(method="sam")),
    "paper": Mode(SLSAMConfig(method="paper")),
    "depth, budget 1": Mode(SLSAMConfig(method="depth", cost_budget=1.0)),
    "remembered": Mode(SLSAMConfig(active_fraction=1.0, ascent="remembered")),
}
REFERENCE = "plain LoRA"


def select_modes(names: Sequence[str] | None, batch: int, accumulation: int) -> dict[str, Mode]:
    """Return plain LoRA and the modes of the given names, or all modes that are possible.

    Args:
        names (`Sequence[str]` or `None`): Keys of `MODES`; `None` for all that differ from the others here.
        batch (`int`): Sequences per micro-batch.
        accumulation (`int`): Micro-batches per step.

    Raises:
        UserError: a name is unknown, or its mode needs more sequences.
    """
    missing = {name: _missing(mode, batch, accumulation) for name, mode in MODES.items()}
    if names is None:
        return {name: mode for name, mode in MODES.items() if missing[name] is None}
    for name in names:
        if name not in MODES:
            allowed = "".join(f"\n  {known}" for known in MODES)
            raise UserError(f"--modes: {name!r} is not known.{hint_at(name, MODES)} The modes are:{allowed}")
        if missing[name] is not None:
            raise UserError(f"--modes: {name!r} needs {missing[name]}.")
    return {name: mode for name, mode in MODES.items() if name == REFERENCE or name in names}


def sizes_of(mode: Mode, batch: int, accumulation: int) -> tuple[int, int]:
    """Return a mode's sequences per micro-batch, and micro-batches per step."""
    return (1, batch * accumulation) if mode.accumulated else (batch, accumulation)


def _missing(mode: Mode, batch: int, accumulation: int) -> str | None:
    """Return what a step lacks that makes the mode another one than the rest; `None` where it lacks nothing."""
    if mode.accumulated and batch == 1:
        return "--batch_size 2 or more, whose sequences it takes one at a time"
    return None
