"""Saves and restores buffers that forward passes change, such as running statistics and kept noise.

Which ones do is seen when they run: a tensor counts its changes. Until a pass has shown it, small buffers are all
copied; from then on those that changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

SMALL = (
    2**18
)  # elements; what is larger (the weights of some quantised layers) is copied once it has been seen to change


@dataclass(frozen=True, eq=False)
class Saved:
    """A buffer as it was.

    Args:
        module (`nn.Module`): Its owner.
        name (`str`): Its name there.
        tensor (`torch.Tensor` or `None`): The buffer itself.
        version (`int`): How often it had been changed.
        copy (`torch.Tensor` or `None`): Its values; `None` where they were not copied.
    """

    module: nn.Module
    name: str
    tensor: torch.Tensor | None
    version: int
    copy: torch.Tensor | None

    @property
    def changed(self) -> bool:
        """Whether the buffer is another one now, or has other values."""
        now = self.module._buffers.get(self.name)
        return now is not self.tensor or (now is not None and _version(now) != self.version)


class Buffers:
    """The buffers of some modules.

    Args:
        modules (`Sequence[nn.Module]`): Modules that own buffers.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._places = [(module, name) for module in modules for name in module._buffers]
        self._changing: set[tuple[nn.Module, str]] = set()
        self._settled = False

    def snapshot(self) -> list[Saved]:
        """Return the buffers as they are now."""
        return [self._saved(module, name) for module, name in self._places]

    def restore(self, saved: Sequence[Saved]) -> None:
        """Put back the buffers that changed since; what was not copied stays as it is."""
        for buffer in self.changed(saved):
            if buffer.tensor is not None and buffer.copy is not None and _version(buffer.tensor) != buffer.version:
                with torch.no_grad():
                    buffer.tensor.copy_(buffer.copy)
            buffer.module._buffers[buffer.name] = buffer.tensor

    def changed(self, saved: Sequence[Saved]) -> list[Saved]:
        """Return those that changed since they were saved, and remember to copy them from now on."""
        changed = [buffer for buffer in saved if buffer.changed]
        self._changing.update((buffer.module, buffer.name) for buffer in changed)
        return changed

    def settle(self) -> None:
        """Copy from now on only what has changed so far; a pass has shown what does."""
        self._settled = True

    def _saved(self, module: nn.Module, name: str) -> Saved:
        tensor = module._buffers.get(name)
        if tensor is None:
            return Saved(module, name, None, 0, None)
        wanted = (module, name) in self._changing or (not self._settled and tensor.numel() <= SMALL)
        return Saved(module, name, tensor, _version(tensor), tensor.detach().clone() if wanted else None)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
