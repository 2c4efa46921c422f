"""Groups named parameters into arms, each of which is switched on or off as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from slsam_peft.algorithm.places import Place, places_of
from slsam_peft.algorithm.shards import gathering_modules
from slsam_peft.algorithm.swap import Site, Sites, sites_of
from slsam_peft.config import GRANULARITIES, check_name

Granularity = str | Callable[[str], str]


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
        gathering (`Sequence[nn.Module]`, *optional*, defaults to `()`): The modules that gather sharded parameters
            while they run (FSDP2).
        devices (`Sequence[torch.device]`, *optional*, defaults to `()`): The devices the model lies on.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        blocks: Sequence[nn.Module] = (),
        above: Sequence[nn.Module] = (),
        buffered: Mapping[str, nn.Module] | None = None,
        unsure: Mapping[str, Sequence[nn.Module]] | None = None,
        all_blocks: Sequence[nn.Module] | None = None,
        gathering: Sequence[nn.Module] = (),
        devices: Sequence[torch.device] = (),
    ) -> None:
        self._arms = tuple(arms)
        self.blocks = tuple(blocks)
        self.above = tuple(above)
        self.buffered = dict(buffered or {})
        self.unsure = dict(unsure or {})
        self.all_blocks = self.blocks if all_blocks is None else tuple(all_blocks)
        self.gathering = tuple(gathering)
        self.devices = tuple(devices)

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
    places, stacks = places_of(model)
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
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(_arm_name(place, granularity), []).append(place)
    sites = sites_of(model, [place.parameter for place in places])
    arms = [_arm(name, members, sites) for name, members in groups.items()]
    if granularity in ("block", "module") and stacks:
        arms.sort(key=lambda arm: -1 if arm.depth is None else arm.depth)  # stable
    buffered = {name: module for name, module in model.named_modules() if module._buffers}
    guessed = {n: [m.owner for m in members] for n, members in groups.items() if all(m.unsure for m in members)}
    blocks = [block for stack in stacks for block in stack]
    about = (buffered, guessed, blocks, gathering_modules(model), list({p.device: 1 for p in model.parameters()}))
    if len(stacks) != 1:
        return Arms(arms, (), (), *about)
    above = list(dict.fromkeys(p.owner for p in places if p.depth == len(blocks)))
    return Arms(arms, blocks, above, *about)


def _arm_name(place: Place, granularity: Granularity) -> str:
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


def _arm(name: str, members: list[Place], sites: Sites) -> Arm:
    depths = [m.depth for m in members if m.depth is not None]
    return Arm(
        name=name,
        parameter_names=tuple(m.name for m in members),
        parameters=tuple(m.parameter for m in members),
        sites=tuple(tuple(sites[m.parameter]) for m in members),
        depth=min(depths) if depths else None,
    )
