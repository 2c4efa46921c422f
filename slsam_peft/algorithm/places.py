"""Locates trainable parameters in a model: in which block, in which adapter module, at which depth.

Blocks and adapter modules are found by structure, never by their names:

- the *block stack* is the outermost `nn.ModuleList` of composite modules that holds trainable parameters;
- an *adapter module* is the largest module below a block whose frozen parameters all belong to one leaf, the layer it
  adapts (entries of module and parameter dictionaries, where PEFT keeps further adapters, do not count).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from slsam_peft.algorithm.blocks import block_stacks

_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, nn.ModuleList, nn.ParameterList)


@dataclass(frozen=True, eq=False)
class Place:
    """Where one trainable parameter lives."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    attribute: str
    block_name: str | None
    module_name: str  # the adapter module, or the owner
    depth: int | None
    shared: bool
    unsure: bool  # whether the depth, below or above the blocks, is a guess


def places_of(model: nn.Module) -> tuple[list[Place], list[tuple[nn.Module, ...]]]:
    """Locate every trainable parameter; return the places and the block stacks that hold some of them."""
    # A stack in which nothing is trained, such as a frozen vision tower, holds no arm.
    stacks = [(path, stack) for path, stack in block_stacks(model) if any(p.requires_grad for p in stack.parameters())]
    blocks = {f"{path}.{i}" if path else str(i): block for path, stack in stacks for i, block in enumerate(stack)}
    block_names = list(blocks)
    block_index = {name: i for i, name in enumerate(block_names)}
    modules = dict(model.named_modules(remove_duplicate=False))
    order = {name: i for i, name in enumerate(modules)}
    first_block = min((order[name] for name in block_names), default=0)
    bodies = _bodies(modules)
    base_leaves = _BaseLeaves()
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            owners.setdefault(parameter, []).append(name)

    def depth_of(name: str) -> int | None:
        if not block_names:
            return None
        path = name.rpartition(".")[0]
        inside = _block_of(path, block_index)
        if inside is not None:
            return block_index[inside]
        # What is not known to lie above the stack counts as below it: that only costs time.
        below = _is_embedding(path, modules) or (order[path] < first_block and not is_head(path))
        return -1 if below else len(block_names)

    def is_head(path: str) -> bool:
        """Whether a model that names its body (`base_model_prefix`) has the module outside, and the blocks inside."""
        return any(
            path.startswith(f"{around}." if around else "")
            and not f"{path}.".startswith(f"{body}.")
            and all(name.startswith(f"{body}.") for name in block_names)
            for around, body in bodies
        )

    def is_unsure(name: str) -> bool:
        path = name.rpartition(".")[0]
        outside = bool(block_names) and _block_of(path, block_index) is None
        return outside and order[path] < first_block and not _is_embedding(path, modules)

    places = []
    for parameter, names in owners.items():
        name = names[0]
        path, _, attribute = name.rpartition(".")
        block_name = _block_of(path, block_index)
        depths = [d for d in map(depth_of, names) if d is not None]
        if len(names) > 1 and any(_block_of(n.rpartition(".")[0], block_index) != block_name for n in names):
            block_name = None  # shared between blocks, or with the outside: an arm of its own
        places.append(
            Place(
                name=name,
                parameter=parameter,
                owner=modules[path],
                attribute=attribute,
                block_name=block_name,
                module_name=_adapter_module(path, modules, block_index, base_leaves) or name,
                depth=min(depths) if depths else None,
                shared=len(names) > 1,
                unsure=len(names) == 1 and is_unsure(name),
            )
        )
    return places, [tuple(stack) for _, stack in stacks]


def _bodies(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Return the names of modules that name the child which is their body, and those of the bodies."""
    found = []
    for name, module in modules.items():
        prefix = getattr(module, "base_model_prefix", None)
        if isinstance(prefix, str) and prefix in module._modules:
            found.append((name, f"{name}.{prefix}" if name else prefix))
    return found


def _block_of(path: str, block_index: dict[str, int]) -> str | None:
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        prefix = ".".join(parts[:i])
        if prefix in block_index:
            return prefix
    return None


def _is_embedding(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module at `path`, or the adapter module around it, embeds token ids."""
    while path:
        module = modules[path]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return True
        if not isinstance(module, _CONTAINERS):
            return any(isinstance(child, nn.Embedding) for child in module.children())
        path = path.rpartition(".")[0]
    return False


class _BaseLeaves:
    """Counts the modules below a module that own frozen parameters, dictionaries left out."""

    def __init__(self) -> None:
        self._memo: dict[nn.Module, int] = {}

    def __call__(self, module: nn.Module) -> int:
        if module not in self._memo:
            own = any(not p.requires_grad for p in module.parameters(recurse=False))
            below = sum(self(c) for c in module.children() if not isinstance(c, nn.ModuleDict | nn.ParameterDict))
            self._memo[module] = int(own) + below
        return self._memo[module]


def _adapter_module(
    path: str, modules: dict[str, nn.Module], block_index: dict[str, int], base_leaves: _BaseLeaves
) -> str:
    """Name of the adapter module around the module at `path`, or of the nearest module that is no container."""
    while path and isinstance(modules[path], _CONTAINERS):
        path = path.rpartition(".")[0]
    found = owner = path
    while path and path not in block_index and base_leaves(modules[path]) <= 1:
        if base_leaves(modules[path]) == 1 and not isinstance(modules[path], _CONTAINERS):
            found = path
        path = path.rpartition(".")[0]
    return found or owner
