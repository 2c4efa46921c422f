"""Turns `SLSAM`'s state into a flat dictionary, which an aborted step goes back to and a checkpoint holds."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.ascents import Ascent
from slsam_peft.algorithm.given import load_own_state, own_state, takes_state
from slsam_peft.algorithm.memory import GradientMemory
from slsam_peft.algorithm.radius import Radius
from slsam_peft.algorithm.sampler import Sampler
from slsam_peft.config import SLSAMConfig

State = dict[str, Any]


class Stateful(Protocol):
    """What has such a state: the attributes of `SLSAM` that are read and put back here."""

    config: SLSAMConfig
    arms: Sequence[Arm]
    sampler: Sampler
    memory: GradientMemory
    ascent: Ascent
    active: torch.Tensor
    steps: int
    skipped: int
    skipped_in_a_row: int

    @property
    def radius(self) -> Radius:
        """What makes e."""
        ...


def before_step(owner: Stateful) -> State:
    """Return what a step may change before it is complete: the sampler by a draw, a user's radius by making e."""
    return {**_of_sampler(owner), **(_of_radius(owner) if takes_state(owner.radius) else {})}


def abort_step(owner: Stateful, saved: State) -> None:
    """Put back what `before_step` returned."""
    owner.sampler.load_state_dict(_below(saved, "sampler."))
    skip_step(owner, saved)


def skip_step(owner: Stateful, saved: State) -> None:
    """Let a radius forget a void step, which it has learnt from before that was known; the draw has been made."""
    if takes_state(owner.radius):
        load_own_state(owner.radius, _below(saved, "radius."))


def collect(owner: Stateful) -> State:
    """Return everything that later steps depend on."""
    return {
        "arms": [arm.name for arm in owner.arms],
        "config": owner.config.to_dict(),
        "steps": owner.steps,
        "skipped": owner.skipped,
        "skipped_in_a_row": owner.skipped_in_a_row,
        "active": owner.active.clone(),
        **_of_sampler(owner),
        **{f"ascent.{k}": v for k, v in own_state(owner.ascent).items()},
        **_of_radius(owner),
        **{f"remembered.{k}": v for k, v in owner.memory.state_dict(_names(owner.arms)).items()},
    }


def restore(owner: Stateful, saved: State) -> None:
    """Put back what `collect` returned."""
    owner.sampler.load_state_dict(_below(saved, "sampler."))
    owner.memory.load_state_dict(_below(saved, "remembered."), _names(owner.arms))
    load_own_state(owner.ascent, _below(saved, "ascent."))
    load_own_state(owner.radius, _below(saved, "radius."))
    owner.active = saved["active"].bool().clone()
    owner.steps, owner.skipped = int(saved["steps"]), int(saved["skipped"])
    owner.skipped_in_a_row = int(saved["skipped_in_a_row"])


def check_arms(saved: list[str], arms: Sequence[Arm]) -> None:
    """Raise `ValueError`, naming the first difference, unless a state was saved for the same arms."""
    here = [arm.name for arm in arms]
    if saved == here:
        return
    first_saved, first_here = next(pair for pair in zip_longest(saved, here) if pair[0] != pair[1])
    raise ValueError(
        f"the state was saved for {len(saved)} arms and this model has {len(here)}; the first difference is "
        f"{first_saved!r} (saved) against {first_here!r} (here). Use the same adapter, target modules and "
        "granularity, or start without the saved state."
    )


def _of_sampler(owner: Stateful) -> State:
    return {f"sampler.{key}": value for key, value in owner.sampler.state_dict().items()}


def _of_radius(owner: Stateful) -> State:
    return {f"radius.{key}": value for key, value in own_state(owner.radius).items()}


def _names(arms: Sequence[Arm]) -> list[str]:
    return [name for arm in arms for name in arm.parameter_names]


def _below(saved: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
