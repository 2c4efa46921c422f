"""Saves and restores buffers that forward passes change, such as running statistics.

Which ones do is seen when they run: a tensor counts its changes. Until a pass has shown it, small buffers are all
copied; from then on those that changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

SMALL = 2**18  # elements; larger ones (the weights of some quantised layers) are copied once they were seen to change


@dataclass(frozen=True, eq=False)
class Buffer:
    """A buffer as it was.

    Args:
        module (`nn.Module`): Its owner.
        attribute (`str`): Its name there.
        name (`str`): Its name in the model.
        tensor (`torch.Tensor` or `None`): The buffer itself.
        version (`int`): How often it had been changed.
        copy (`torch.Tensor` or `None`): Its values; `None` where they were not copied.
    """

    module: nn.Module
    attribute: str
    name: str
    tensor: torch.Tensor | None
    version: int
    copy: torch.Tensor | None

    @property
    def now(self) -> torch.Tensor | None:
        """What is in its place now."""
        return self.module._buffers.get(self.attribute)

    @property
    def changed(self) -> bool:
        """Whether there is another tensor in its place, or it has other values."""
        return self.now is not self.tensor or (self.tensor is not None and _version(self.tensor) != self.version)

    def put_back(self) -> None:
        """Restore the tensor and, where they were copied, its values."""
        if self.tensor is not None and self.copy is not None and _version(self.tensor) != self.version:
            with torch.no_grad():
                self.tensor.copy_(self.copy)
        self.module._buffers[self.attribute] = self.tensor


class Buffers:
    """The buffers of some modules.

    Args:
        modules (`Mapping[str, nn.Module]`): Modules that own buffers, by name.

    Attributes:
        settled (`bool`): Whether a pass has shown which of them forwards change.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._places = [(f"{n}.{a}" if n else a, module, a) for n, module in modules.items() for a in module._buffers]
        self._changing: set[str] = set()
        self.settled = not self._places

    def snapshot(self) -> list[Buffer]:
        """Return the buffers as they are now."""
        return [self._saved(*place) for place in self._places]

    def restore(self, saved: Sequence[Buffer]) -> None:
        """Put back the buffers that changed since they were saved."""
        for buffer in self.changed(saved):
            buffer.put_back()

    def changed(self, saved: Sequence[Buffer]) -> list[Buffer]:
        """Return those that changed since they were saved; they are copied from now on."""
        changed = [buffer for buffer in saved if buffer.changed]
        self._changing.update(buffer.name for buffer in changed)
        return changed

    def _saved(self, name: str, module: nn.Module, attribute: str) -> Buffer:
        tensor = module._buffers.get(attribute)
        if tensor is None:
            return Buffer(module, attribute, name, None, 0, None)
        wanted = name in self._changing or (not self.settled and tensor.numel() <= SMALL)
        copy = tensor.detach().clone() if wanted else None
        return Buffer(module, attribute, name, tensor, _version(tensor), copy)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
