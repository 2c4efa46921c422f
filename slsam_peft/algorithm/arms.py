"""Groups named parameters into arms, each of which is switched on or off as one.

Blocks and adapter modules are found by structure, never by their names:

- the *block stack* is the outermost `nn.ModuleList` of composite modules that holds trainable parameters;
- an *adapter module* is the largest module below a block whose frozen parameters all belong to one leaf, the layer it
  adapts (entries of module and parameter dictionaries, where PEFT keeps further adapters, do not count).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slsam_peft.algorithm.blocks import block_stacks
from slsam_peft.algorithm.swap import Site, Sites, sites_of
from slsam_peft.config import GRANULARITIES, check_name

Granularity = str | Callable[[str], str]

_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, nn.ModuleList, nn.ParameterList)


@dataclass(frozen=True, eq=False)
class Arm:
    """A group of trainable parameters that is active or inactive as one (a "layer" in arXiv 2602.09395).

    Args:
        name (`str`): Name of the block, module or parameter it stands for.
        parameter_names (`tuple[str, ...]`): Names as in `model.named_parameters()`.
        parameters (`tuple[nn.Parameter, ...]`): The parameters, in the same order.
        sites (`tuple[tuple[Site, ...], ...]`): For each parameter the places where modules read it; empty where there
            are none, and it is perturbed in place.
        depth (`int` or `None`): Index of the lowest transformer block it reaches; -1 below the stack, the number of
            blocks above it, `None` in a model without blocks.
    """

    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    sites: tuple[tuple[Site, ...], ...]
    depth: int | None = None

    @property
    def size(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.parameters)


class Arms(Sequence[Arm]):
    """The arms of a model, in order, with the block stack they sit in.

    Args:
        arms (`Sequence[Arm]`): The arms.
        blocks (`Sequence[nn.Module]`, *optional*, defaults to `()`): The blocks of the one stack that holds trainable
            parameters; empty where there is none or more than one (encoder-decoder models).
        above (`Sequence[nn.Module]`, *optional*, defaults to `()`): Modules with trainable parameters that are taken
            to run after the stack.
        buffered (`Mapping[str, nn.Module]`, *optional*): The model's modules that own buffers, by name.
        unsure (`Mapping[str, Sequence[nn.Module]]`, *optional*): The modules of arms, by name, whose depth, below or
            above the blocks, is a guess until a forward pass has shown it.
        all_blocks (`Sequence[nn.Module]`, *optional*): The blocks of all stacks; `blocks` where it is missing.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        blocks: Sequence[nn.Module] = (),
        above: Sequence[nn.Module] = (),
        buffered: Mapping[str, nn.Module] | None = None,
        unsure: Mapping[str, Sequence[nn.Module]] | None = None,
        all_blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        self._arms = tuple(arms)
        self.blocks = tuple(blocks)
        self.above = tuple(above)
        self.buffered = dict(buffered or {})
        self.unsure = dict(unsure or {})
        self.all_blocks = self.blocks if all_blocks is None else tuple(all_blocks)

    def confirm(self, behind: Mapping[nn.Module, bool]) -> bool:
        """Settle what is unsure by what a forward pass has shown; return whether any depth has changed.

        Args:
            behind (`Mapping[nn.Module, bool]`): Whether a module runs behind the blocks; those that did not run keep
                their guess.
        """
        found = {
            name: all(seen)
            for name, modules in self.unsure.items()
            if (seen := [behind[m] for m in modules if m in behind])
        }
        depths = [
            arm.depth if arm.name not in found else len(self.all_blocks) if found[arm.name] else -1 for arm in self
        ]
        changed = depths != [arm.depth for arm in self]
        self._arms = tuple(replace(arm, depth=depth) for arm, depth in zip(self, depths, strict=True))
        # A cut is checked against what is taken to lie above it.
        moved = {m for name, above in found.items() if above for m in self.unsure[name]}
        below = {m for name, above in found.items() if not above for m in self.unsure[name]}
        if self.blocks:
            self.above = tuple(m for m in dict.fromkeys((*self.above, *moved)) if m not in below)
        self.unsure = {}
        return changed

    def __len__(self) -> int:
        return len(self._arms)

    def __getitem__(self, index):  # noqa: D105
        return self._arms[index]

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._arms)

    def __repr__(self) -> str:
        return f"Arms({len(self)} arms, {sum(a.size for a in self):,} parameters, {len(self.blocks)} blocks)"


@dataclass(frozen=True, eq=False)
class _Place:
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


def arms_of(model: nn.Module, granularity: Granularity = "block") -> Arms:
    """Group the trainable parameters of `model` into ordered arms.

    Args:
        model (`nn.Module`): The model, adapters included. Parameters with `requires_grad=False` belong to no arm.
        granularity (`str` or callable, *optional*, defaults to `"block"`): `"block"`: all adapters of one transformer
            block, what lies outside the blocks being one arm per module; `"module"`: one adapter module (its factors
            and magnitude together); `"tensor"`: one parameter, in `named_parameters()` order; or a callable from
            parameter name to arm name.

    Returns:
        `Arms`: In depth order (order of first appearance within a depth); `"tensor"` keeps `named_parameters()`
        order and a callable's arms come in order of first appearance. Embeddings come first, the head last, a
        parameter shared by several modules at its lowest place.

    Raises:
        ValueError: no parameter is trainable, the granularity is unknown or returns no name, or `"block"` on a model
            without blocks.
    """
    if not callable(granularity):
        check_name("granularity", granularity, GRANULARITIES, callable_too=True)
    places, stacks = _places(model)
    if not places:
        raise ValueError(
            "the model has no trainable parameter; pass a peft_config, or a PeftModel whose adapter is trainable "
            "(PeftModel.from_pretrained(..., is_trainable=True))."
        )
    if granularity == "block" and not stacks:
        raise ValueError(
            "granularity='block' needs a stack of transformer blocks (an nn.ModuleList of composite modules) and "
            f"{type(model).__name__} has none with trainable parameters; use granularity='module' or 'tensor'."
        )
    groups: dict[str, list[_Place]] = {}
    for place in places:
        groups.setdefault(_arm_name(place, granularity), []).append(place)
    sites = sites_of(model, [place.parameter for place in places])
    arms = [_arm(name, members, sites) for name, members in groups.items()]
    if granularity in ("block", "module") and stacks:
        arms.sort(key=lambda arm: -1 if arm.depth is None else arm.depth)  # stable
    buffered = {name: module for name, module in model.named_modules() if module._buffers}
    guessed = {n: [m.owner for m in members] for n, members in groups.items() if all(m.unsure for m in members)}
    blocks = [block for stack in stacks for block in stack]
    if len(stacks) != 1:
        return Arms(arms, (), (), buffered, guessed, blocks)
    above = list(dict.fromkeys(p.owner for p in places if p.depth == len(blocks)))
    return Arms(arms, blocks, above, buffered, guessed)


def _arm_name(place: _Place, granularity: Granularity) -> str:
    if callable(granularity):
        name = granularity(place.name)
        if not isinstance(name, str):
            raise ValueError(
                f"the granularity returned {name!r} for {place.name!r}; it must return an arm name, a str."
            )
        return name
    if granularity == "tensor":
        return place.name
    if granularity == "block" and place.block_name is not None:
        return place.block_name
    return place.module_name


def _arm(name: str, members: list[_Place], sites: Sites) -> Arm:
    depths = [m.depth for m in members if m.depth is not None]
    return Arm(
        name=name,
        parameter_names=tuple(m.name for m in members),
        parameters=tuple(m.parameter for m in members),
        sites=tuple(tuple(sites[m.parameter]) for m in members),
        depth=min(depths) if depths else None,
    )


def _places(model: nn.Module) -> tuple[list[_Place], list[tuple[nn.Module, ...]]]:
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
            _Place(
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


class ArmNorms:
    """L2 norms of gradients per arm, without leaving the device.

    Args:
        arms (`Sequence[Arm]`): The arms; norms come in their order.
    """

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._parameters = [p for arm in arms for p in arm.parameters]
        self._arm_index = torch.tensor([i for i, arm in enumerate(arms) for _ in arm.parameters])
        self._count = len(arms)
        self._index_on: dict[torch.device, torch.Tensor] = {}

    def squared(self, gradients: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
        """Return the squared norms, shape `(arms,)`, float64 where a gradient is float64 and float32 otherwise.

        Args:
            gradients (`Sequence[torch.Tensor | None]`): One per parameter, in arm order; `None` counts as 0.
            device (`torch.device`): Where the result lies; norms taken on other devices are brought there.
        """
        tensors = [g for g in gradients if g is not None]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        zero = torch.zeros((), dtype=dtype, device=device)
        found = iter(torch._foreach_norm(tensors, 2, dtype=dtype)) if tensors else iter(())
        norms = torch.stack([zero if g is None else next(found).to(device) for g in gradients])
        if device not in self._index_on:
            self._index_on[device] = self._arm_index.to(device)
        return zero.new_zeros(self._count).index_add_(0, self._index_on[device], norms.square())
