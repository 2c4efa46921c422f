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
        fewer (`int`, *optional*, defaults to `0`): Parts that a step has less than the reference's: micro-batches
            under gradient accumulation, else sequences.
    """

    config: SLSAMConfig | None = None
    fewer: int = 0


# Reference, the method everybody knows, and what is proposed instead. The radius does not change the cost.
MODES = {
    "plain LoRA": Mode(),
    "dense SAM": Mode(SLSAMConfig(active_fraction=1.0)),
    "paper's sampling": Mode(SLSAMConfig(bandit="paper", design="bernoulli", active_fraction=0.2)),
    "two_pass, depth, budget 1.0": Mode(SLSAMConfig(design="depth", cost_budget=1.0)),
    "partial 1/4, depth, budget 0.75": Mode(SLSAMConfig(ascent="partial", design="depth", cost_budget=0.75)),
    "stale gradient, depth, budget 0.65": Mode(SLSAMConfig(ascent="remembered", design="depth", cost_budget=0.65)),
    # The least fraction: one sequence, or one micro-batch.
    "partial ascent, one fewer": Mode(SLSAMConfig(ascent="partial", ascent_fraction=0.01, active_fraction=1.0), 1),
    "look-ahead ascent, one fewer": Mode(SLSAMConfig(ascent="ahead", ascent_fraction=0.01, active_fraction=1.0), 1),
}
REFERENCE = "plain LoRA"


def select_modes(names: Sequence[str] | None, batch: int, accumulation: int) -> dict[str, Mode]:
    """Return plain LoRA and the modes of the given names, or all modes that are possible.

    Args:
        names (`Sequence[str]` or `None`): Keys of `MODES`; `None` for all that a step has parts for.
        batch (`int`): Sequences per micro-batch.
        accumulation (`int`): Micro-batches per step.

    Raises:
        UserError: a name is unknown, or its mode needs more sequences or micro-batches.
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


def parts_of(batch: int, accumulation: int) -> int:
    """Return what a step consists of: its micro-batches, or the sequences of its only one."""
    return accumulation if accumulation > 1 else batch


def _missing(mode: Mode, batch: int, accumulation: int) -> str | None:
    """Return what a step lacks that the mode needs, or `None` where it lacks nothing."""
    if mode.config is not None and mode.config.ascent == "ahead":
        enough = accumulation == 1 and batch - mode.fewer >= 1
        return None if enough else "--gradient_accumulation_steps 1 and --batch_size 2 or more"
    partial = mode.config is not None and mode.config.ascent == "partial"
    least = 2 + mode.fewer if partial else 1  # of two the ascent takes one
    enough = parts_of(batch, accumulation) >= least
    return None if enough else f"--batch_size {least} or more, or --gradient_accumulation_steps {least} or more"
