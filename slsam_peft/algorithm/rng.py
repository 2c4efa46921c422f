"""Saves and restores the random state of a model's devices, so a second pass can replay the first one's dropout."""

from collections.abc import Iterable

import torch

State = dict[torch.device, torch.Tensor]

CPU = torch.device("cpu")


def accelerators_of(parameters: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """Return the devices, other than the CPU, that have a random generator of their own."""
    return tuple({p.device for p in parameters if p.device.type not in ("cpu", "meta")})


def snapshot(accelerators: Iterable[torch.device]) -> State:
    """Return the state of the CPU's generator and of each accelerator's."""
    state = {CPU: torch.get_rng_state()}
    for device in accelerators:
        state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore(state: State) -> None:
    """Put back what `snapshot` returned."""
    for device, value in state.items():
        if device == CPU:
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)
