"""Builds the modules an adapter needs around it, from the names and shapes in its own file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_BASES = ("original_module",)
_EMBEDDINGS = ("embed", "wte", "wpe")  # in names, where no shape tells


class SkeletonError(ValueError):
    """The file holds something whose module its name and shape do not tell."""


class _Unadapted(nn.Module):
    """Stands for the layers without an adapter: a module that holds one is never taken for an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


def _container() -> nn.Module:
    module = nn.Module()
    module.add_module("unadapted", _Unadapted())
    return module


def skeleton_of(shapes: Shapes) -> nn.Module:
    """Return modules on the meta device under the names that a LoRA adapter was trained in.

    Linear layers and embeddings have their true sizes. Layers without an adapter are missing, blocks without one are
    empty. What lies outside the blocks is taken to run after them, unless it is an embedding; layers of a block come
    in alphabetical order.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Every tensor of `adapter_model.safetensors`.

    Raises:
        SkeletonError: a tensor is neither a factor of a linear layer or an embedding nor a weight trained in full.
    """
    # The tensors of each layer, by the layer's path.
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if any(part in name.split(".") for part in _BASES):
            continue  # what the adapter was trained beside
        parts = [
            part for part in name.removeprefix(PREFIX).split(".") if part not in ("base_layer", "modules_to_save")
        ]
        cut = next((i for i, part in enumerate(parts) if part in _FACTORS), len(parts) - 1)
        layers.setdefault(".".join(parts[:cut]), {})[parts[cut]] = shape
    # The layers in the modules that hold them.
    tree: dict[str, Any] = {}
    for path, found in layers.items():
        node, parts = tree, path.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise SkeletonError(f"{path} lies inside another adapted layer")
        if isinstance(node.get(parts[-1]), dict):
            raise SkeletonError(f"{path} has adapted layers inside")
        node[parts[-1]] = _layer(path, found)
    return _module(tree)


def _layer(path: str, found: dict[str, tuple[int, ...]]) -> nn.Module:
    down, up = found.get("lora_A"), found.get("lora_B")
    if down and up and len(down) == len(up) == 2:
        return nn.Linear(down[1], up[0], bias=False, device="meta")
    down, up = found.get("lora_embedding_A"), found.get("lora_embedding_B")
    if down and up:
        return nn.Embedding(down[1], up[0], device="meta")
    weight = found.get("weight")
    if weight is None or set(found) - {"weight", "bias"}:
        raise SkeletonError(f"{path} has {', '.join(sorted(found))}")
    if len(weight) == 2 and any(word in path.rpartition(".")[2] for word in _EMBEDDINGS):
        return nn.Embedding(*weight, device="meta")
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias="bias" in found, device="meta")
    layer = nn.Module()
    for name, shape in found.items():
        layer.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return layer


def _module(tree: dict[str, Any]) -> nn.Module:
    if all(name.isdigit() for name in tree):
        children = {int(name): child for name, child in tree.items()}
        return nn.ModuleList(
            [_child(children[i]) if i in children else _container() for i in range(max(children) + 1)]
        )
    module = _container()
    for name in sorted(tree, key=lambda name: (_rank(tree[name]), name)):
        module.add_module(name, _child(tree[name]))
    return module


def _child(child: Any) -> nn.Module:
    return _module(child) if isinstance(child, dict) else child


def _rank(child: Any) -> int:
    """Return the order in which parts of a model run: embeddings, what holds the blocks, everything else."""
    if isinstance(child, nn.Embedding):
        return 0
    return 1 if _holds_blocks(child) else 2


def _holds_blocks(child: Any) -> bool:
    return isinstance(child, dict) and (all(n.isdigit() for n in child) or any(map(_holds_blocks, child.values())))
