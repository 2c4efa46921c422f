"""The state of `SLSAM` as a flat dictionary: what an aborted update goes back to, and what a checkpoint holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slsam_peft.algorithm.arms import Arm

if TYPE_CHECKING:
    from slsam_peft.algorithm.slsam import SLSAM

State = dict[str, Any]


def sampler(slsam: "SLSAM") -> State:
    """Return what a draw and a bandit update change."""
    return {
        "generator": slsam.generator.get_state(),
        **{f"design.{key}": value for key, value in slsam.design.state_dict().items()},
        **{f"bandit.{key}": value for key, value in slsam.bandit.state_dict().items()},
    }


def restore_sampler(slsam: "SLSAM", saved: State) -> None:
    """Put back what `sampler` returned."""
    slsam.bandit.load_state_dict(_below(saved, "bandit."))
    slsam.generator.set_state(saved["generator"])
    slsam.design.load_state_dict(_below(saved, "design."))


def collect(slsam: "SLSAM") -> State:
    """Return everything later updates depend on."""
    return {
        "arms": [arm.name for arm in slsam.arms],
        "config": slsam.config.to_dict(),
        "steps": slsam.steps,
        "skipped": slsam.skipped,
        "skipped_in_a_row": slsam.skipped_in_a_row,
        "active": slsam.active.clone(),
        "fired": slsam.runner.fired(),
        **sampler(slsam),
        **{f"remembered.{k}": v for k, v in slsam.memory.state_dict(_names(slsam.arms)).items()},
    }


def restore(slsam: "SLSAM", saved: State) -> None:
    """Put back what `collect` returned."""
    restore_sampler(slsam, saved)
    slsam.runner.set_fired(saved["fired"].bool())
    slsam.memory.load_state_dict(_below(saved, "remembered."), _names(slsam.arms))
    slsam.active = saved["active"].bool().clone()
    slsam.steps, slsam.skipped = int(saved["steps"]), int(saved["skipped"])
    slsam.skipped_in_a_row = int(saved["skipped_in_a_row"])


def check_arms(saved: list[str], arms: Sequence[Arm]) -> None:
    """Raise `ValueError`, naming the first difference, unless a state was saved for the same arms."""
    here = [arm.name for arm in arms]
    if saved != here:
        there, mine = next(p for p in zip([*saved, None], [*here, None], strict=False) if p[0] != p[1])
        raise ValueError(
            f"the state was saved for {len(saved)} arms and this model has {len(here)}; the first difference is "
            f"{there!r} (saved) against {mine!r} (here). Use the same adapter, target modules and granularity, or "
            "start without the saved state."
        )


def _names(arms: Sequence[Arm]) -> list[str]:
    return [name for arm in arms for name in arm.parameter_names]


def _below(saved: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
