"""Locates trainable parameters in a model: in which block, in which adapter module, at which depth.

Blocks and adapter modules are found by structure, never by their names:

- a *block stack* is an outermost `nn.ModuleList` of composite modules that holds trainable parameters;
- an *adapter module* is the largest module below a block whose frozen parameters all belong to one leaf, the layer it
  adapts (entries of module and parameter dictionaries, where PEFT keeps further adapters, do not count).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from slsam_peft.algorithm.blocks import block_stacks
from slsam_peft.algorithm.layout import Layout

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
    anchors: tuple[nn.Module, ...]  # the blocks that read it; outside the blocks the modules that do
    shared: bool


def places_of(model: nn.Module) -> tuple[list[Place], Layout]:
    """Locate every trainable parameter; return the places, and where blocks and the modules outside them run."""
    # A stack in which nothing is trained, such as a frozen vision tower, holds no arm.
    stacks = [(path, stack) for path, stack in block_stacks(model) if any(p.requires_grad for p in stack.parameters())]
    blocks = {f"{path}.{i}" if path else str(i): block for path, stack in stacks for i, block in enumerate(stack)}
    block_index = {name: i for i, name in enumerate(blocks)}
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            owners.setdefault(parameter, []).append(name)
    layout = Layout({path: tuple(stack) for path, stack in stacks})
    guess = _Guess(modules, blocks)
    base_leaves = _BaseLeaves()
    places = []
    for parameter, names in owners.items():
        name = names[0]
        path, _, attribute = name.rpartition(".")
        block_name = _block_of(path, block_index)
        anchors = []
        for reader in (n.rpartition(".")[0] for n in names):
            inside = _block_of(reader, block_index)
            anchors.append(modules[reader] if inside is None else blocks[inside])
            if inside is None and blocks:
                layout.place(modules[reader], *guess(reader), modules[_not_a_container(reader, modules)])
        layout.share(anchors)
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
                anchors=tuple(anchors),
                shared=len(names) > 1,
            )
        )
    return places, layout


class _Guess:
    """Guesses where modules outside the blocks run, by the order in which they are registered.

    Args:
        modules (`Mapping[str, nn.Module]`): All modules of the model, by name, in order.
        blocks (`Mapping[str, nn.Module]`): The blocks, by name, in order.
    """

    def __init__(self, modules: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.blocks = list(blocks)
        self._order = {name: i for i, name in enumerate(modules)}
        self._bodies = _bodies(modules)

    def __call__(self, path: str) -> tuple[int, bool]:
        """Return a depth for the module at `path`, and whether it is no more than a guess.

        What is not known to lie above a block counts as below it: that only costs time.
        """
        if _is_embedding(path, self.modules):
            return -1, False
        if self._is_head(path):
            return len(self.blocks), self._order[path] < self._order[self.blocks[0]]
        before = sum(self._order[name] < self._order[path] for name in self.blocks)
        if before == len(self.blocks):
            return before, any(f"{path}.".startswith(f"{body}.") for _, body in self._bodies)
        return before - 1, True

    def _is_head(self, path: str) -> bool:
        """Whether a model that names its body (`base_model_prefix`) has the module outside, and the blocks inside."""
        return any(
            path.startswith(f"{around}." if around else "")
            and not f"{path}.".startswith(f"{body}.")
            and all(name.startswith(f"{body}.") for name in self.blocks)
            for around, body in self._bodies
        )


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


def _not_a_container(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of a module, or of the one around it that runs itself."""
    while path and isinstance(modules[path], _CONTAINERS):
        path = path.rpartition(".")[0]
    return path


def _is_embedding(path: str, modules: Mapping[str, nn.Module]) -> bool:
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
    found = owner = path = _not_a_container(path, modules)
    while path and path not in block_index and base_leaves(modules[path]) <= 1:
        if base_leaves(modules[path]) == 1 and not isinstance(modules[path], _CONTAINERS):
            found = path
        path = path.rpartition(".")[0]
    return found or owner
