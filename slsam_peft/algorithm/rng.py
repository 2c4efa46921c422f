"""Saves and restores what a forward pass draws its noise from, so a second pass can replay the first one's.

That is the random state of torch on the CPU and on the model's devices, that of Python's `random`, which skips blocks
and augments in some models, and that of NumPy where it is loaded (SpecAugment), and buffers that forwards change.
"""

import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slsam_peft.algorithm.buffers import Buffers

State = dict[Any, Any]

CPU = torch.device("cpu")
SILENT = ("cpu", "meta")  # types of devices that have no generator beside the CPU's
_PYTHON, _NUMPY = "random", "numpy.random"


@dataclass(frozen=True, eq=False)
class Sources:
    """What the noise of a model's passes comes from.

    Args:
        devices (`tuple[torch.device, ...]`): Those that have a random generator of their own, the CPU left out.
        buffers (`Buffers`): The model's buffers.
    """

    devices: tuple[torch.device, ...]
    buffers: Buffers


def accelerators_of(
    parameters: Iterable[torch.Tensor], devices: Iterable[torch.device] = ()
) -> tuple[torch.device, ...]:
    """Return the devices, of tensors and others, that have a random generator of their own; the CPU left out."""
    found = dict.fromkeys((*(p.device for p in parameters), *devices))
    return tuple(device for device in found if device.type not in SILENT)


def sources_of(
    parameters: Iterable[torch.Tensor],
    buffered: Mapping[str, nn.Module] | None = None,
    devices: Iterable[torch.device] = (),
) -> Sources:
    """Return the sources of noise of a model.

    Args:
        parameters (`Iterable[torch.Tensor]`): What is trained.
        buffered (`Mapping[str, nn.Module]`, *optional*): Modules with buffers, by name.
        devices (`Iterable[torch.device]`, *optional*, defaults to `()`): Where the rest of the model lies: what is
            frozen there may draw noise, too.
    """
    return Sources(accelerators_of(parameters, devices), Buffers(buffered or {}))


def snapshot(sources: Sources | Iterable[torch.device]) -> State:
    """Return the state of the CPU's generators, of each accelerator's and of the buffers that forwards change.

    Args:
        sources (`Sources` or `Iterable[torch.device]`): What `sources_of` returned; devices alone leave buffers out.
    """
    devices = sources.devices if isinstance(sources, Sources) else sources
    state: State = {CPU: torch.get_rng_state(), _PYTHON: random.getstate()}
    for device in devices:
        state[device] = torch.get_device_module(device).get_rng_state(device)
    if (numpy := sys.modules.get(_NUMPY)) is not None:  # nobody draws from it before it is loaded
        state[_NUMPY] = numpy.get_state(legacy=False)
    if isinstance(sources, Sources):
        state[Buffers] = (sources.buffers, sources.buffers.snapshot())
    return state


def restore(state: State) -> None:
    """Put back what `snapshot` returned."""
    for source, value in state.items():
        if source == CPU:
            torch.set_rng_state(value)
        elif source == _PYTHON:
            random.setstate(value)
        elif source == _NUMPY:
            sys.modules[_NUMPY].set_state(value)
        elif source is Buffers:
            buffers, saved = value
            buffers.restore(saved)
        else:
            torch.get_device_module(source).set_rng_state(value, source)
