"""Lists the modes that `slsam-peft bench` times. Nothing here imports torch, so that the help can name them."""

from collections.abc import Sequence
from dataclasses import dataclass

from slsam_peft.config import SLSAMConfig
from slsam_peft.errors import UserError
from slsam_peft.names import hint_at


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Args:
        config (`SLSAMConfig`, *optional*): Settings of SL-SAM; plain `SFTTrainer` without.
        accumulated (`bool`, *optional*, defaults to `False`): Whether the sequences of a step come one at a time, in
            micro-batches of one.
        named (`bool`, *optional*, defaults to `False`): Whether it is timed only where it is named.
    """

    config: SLSAMConfig | None = None
    accumulated: bool = False
    named: bool = False


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
    "remembered": Mode(
        SLSAMConfig(
            active_fraction=1.0, ascent="remembered", bandit="scale_free", design="bernoulli", descent="active"
        )
    ),
    # Rules of other papers.
    "asam": Mode(SLSAMConfig(method="auto", radius="asam"), named=True),
    "neuron": Mode(SLSAMConfig(method="auto", radius="neuron"), named=True),
    "weight": Mode(SLSAMConfig(method="auto", radius="weight"), named=True),
    "zeroth order": Mode(SLSAMConfig(method="auto", ascent="zeroth_order"), named=True),
    "sampa": Mode(SLSAMConfig(method="auto", ascent="sampa"), named=True),
    "bar": Mode(SLSAMConfig(method="bar"), named=True),
    "bi-lora": Mode(SLSAMConfig(method="bi_lora"), named=True),
    "flat-lora": Mode(SLSAMConfig(method="flat_lora"), named=True),
}
REFERENCE = "plain LoRA"


def select_modes(names: Sequence[str] | None, batch: int, accumulation: int) -> dict[str, Mode]:
    """Return plain LoRA and the modes of the given names, or all modes that are possible.

    Args:
        names (`Sequence[str]` or `None`): Keys of `MODES`; `None` for ours that differ from the others here.
        batch (`int`): Sequences per micro-batch.
        accumulation (`int`): Micro-batches per step.

    Raises:
        UserError: a name is unknown, or its mode needs more sequences.
    """
    missing = {name: _missing(mode, batch, accumulation) for name, mode in MODES.items()}
    if names is None:
        return {name: mode for name, mode in MODES.items() if missing[name] is None and not mode.named}
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
