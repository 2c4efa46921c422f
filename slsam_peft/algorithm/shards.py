"""Parameters that FSDP2 (`fully_shard`) shards: each rank holds and moves its piece, and norms are over all pieces.

While a module runs, gathered tensors stand in the place of its parameters, so w + e cannot be handed to it: pieces are
moved in place between passes. Gradients arrive averaged over ranks, each rank holding those of its pieces. Every pass
exchanges weights and gradients, so all ranks must run the same passes: none is cut, and what the ranks' batches decide
is agreed on.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_TENSOR, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"  # heavy, and loaded by whoever shards
UNKNOWN = -1


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is distributed over ranks (a `DTensor`)."""
    return (module := sys.modules.get(_TENSOR)) is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Return this rank's piece of a tensor, on the same storage; the tensor itself where it is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


class Shards:
    """The sharded parameters among those of the arms, and the modules that gather them.

    Args:
        parameters (`Sequence[nn.Parameter]`): Every arm's parameters.
        modules (`Sequence[nn.Module]`): The modules that `fully_shard` was called on.

    Raises:
        ValueError: some are distributed in another way than `fully_shard` does it on a mesh of one dimension, or of
            two of which the first replicates; or over several meshes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> None:
        sharded: list[Any] = [p for p in parameters if is_sharded(p)]
        self.modules = tuple(modules)
        self._mask = torch.tensor([is_sharded(p) for p in parameters])
        self.mesh = sharded[0].device_mesh
        gathered = {p for module in self.modules for p in module.parameters()}
        for parameter in sharded:
            kinds = [p.is_shard() for p in parameter.placements]
            alone = kinds == [True] or (kinds == [False, True] and parameter.placements[0].is_replicate())
            if parameter not in gathered or not alone or parameter.device_mesh != self.mesh:
                raise ValueError(
                    f"a trained parameter of shape {tuple(parameter.shape)} is distributed as {parameter.placements} "
                    f"over {parameter.device_mesh}. Only what fully_shard (FSDP2) shards over one mesh is supported, "
                    "not tensor parallelism: shard with fully_shard alone, or use DDP."
                )
        self._group = self.mesh.get_group(self.mesh.ndim - 1)

    def release(self) -> None:
        """Let every module gather its parameters afresh the next time it runs; some keep what they gathered."""
        for module in self.modules:
            module.reshard()  # type: ignore[operator]  # it is an FSDPModule

    def summed(self, squares: torch.Tensor) -> torch.Tensor:
        """Return squared norms of whole gradients from those of this rank's pieces, shape `(P,)`, on every rank."""
        total = squares.clone()
        dist.all_reduce(total, group=self._group)
        return torch.where(self._mask.to(squares.device), total, squares)

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors that are no pieces by their means over all ranks of the mesh, in place."""
        for tensor in tensors:
            for dim in range(self.mesh.ndim):
                dist.all_reduce(tensor, group=self.mesh.get_group(dim))
            tensor.div_(self.mesh.size())

    def least(self, number: int | None) -> int | None:
        """Return the least of a number over ranks; `None` where it is not known on one of them."""
        agreed = torch.tensor(UNKNOWN if number is None else number, device=self._mask.device)
        agreed = agreed.to(self.mesh.device_type)
        for dim in range(self.mesh.ndim):
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.mesh.get_group(dim))
        return None if int(agreed) == UNKNOWN else int(agreed)


def gathering_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that `fully_shard` was called on."""
    module = sys.modules.get(_FSDP)
    kind: Any = getattr(module, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def shards_of(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> Shards | None:
    """Return the shards among parameters; `None` where no parameter is sharded."""
    return Shards(parameters, modules) if any(is_sharded(p) for p in parameters) else None
