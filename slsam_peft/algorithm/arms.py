"""Groups named parameters into arms, each of which is switched on or off as one."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from slsam_peft.algorithm.absent import rank_allocators
from slsam_peft.algorithm.layout import Layout
from slsam_peft.algorithm.places import Place, places_of
from slsam_peft.algorithm.shards import gathering_modules
from slsam_peft.algorithm.swap import Site, Sites, sites_of
from slsam_peft.names import check_name
from slsam_peft.presets import GRANULARITIES

Granularity = str | Callable[[str], str]

logger = logging.getLogger(__name__)

_told: WeakSet[nn.Module] = WeakSet()  # models whose missing blocks were spoken of


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
    """The arms of a model, in order, with the block stacks they sit in.

    Args:
        arms (`Sequence[Arm]`): The arms.
        layout (`Layout`): The stacks, and where what lies outside them runs.
        anchors (`Mapping[str, Sequence[nn.Module]]`): For each arm, by name, the blocks and the modules outside them
            that read it.
        buffered (`Mapping[str, nn.Module]`, *optional*): The model's modules that own buffers, by name.
        allocators (`Sequence`, *optional*, defaults to `()`): AdaLoRA's rank allocators, which read gradients.
        gathering (`Sequence[nn.Module]`, *optional*, defaults to `()`): The modules that gather sharded parameters
            while they run (FSDP2).
        devices (`Sequence[torch.device]`, *optional*, defaults to `()`): The devices the model lies on.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        layout: Layout,
        anchors: Mapping[str, Sequence[nn.Module]],
        buffered: Mapping[str, nn.Module] | None = None,
        allocators: Sequence[Any] = (),
        gathering: Sequence[nn.Module] = (),
        devices: Sequence[torch.device] = (),
    ) -> None:
        self._arms = tuple(arms)
        self._anchors = dict(anchors)
        self.layout = layout
        self.buffered = dict(buffered or {})
        self.allocators = tuple(allocators)
        self.gathering = tuple(gathering)
        self.devices = tuple(devices)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of the one stack that holds trainable parameters; empty where there is none or more than one."""
        return tuple(self.layout.blocks) if len(self.layout.stacks) == 1 else ()

    def place_again(self) -> None:
        """Set the arms' depths by the layout as it is now; their order stays."""
        self._arms = tuple(replace(arm, depth=self.layout.depth(self._anchors[arm.name])) for arm in self)

    def __len__(self) -> int:
        return len(self._arms)

    def __getitem__(self, index):  # noqa: D105
        return self._arms[index]

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._arms)

    def __repr__(self) -> str:
        return f"Arms({len(self)} arms, {sum(a.size for a in self):,} parameters, {len(self.layout.blocks)} blocks)"


def arms_of(model: nn.Module, granularity: Granularity = "block") -> Arms:
    """Group the trainable parameters of `model` into ordered arms.

    Args:
        model (`nn.Module`): The model, adapters included. Parameters with `requires_grad=False` belong to no arm.
        granularity (`str` or callable, *optional*, defaults to `"block"`): `"block"`: all adapters of one transformer
            block, what lies outside the blocks being one arm per module, and so is everything in a model that trains
            nothing in blocks (prompts; said once); `"module"`: one adapter module (its factors and magnitude
            together); `"tensor"`: one parameter, in `named_parameters()` order; or a callable from parameter name to
            arm name.

    Returns:
        `Arms`: In depth order (order of first appearance within a depth); `"tensor"` keeps `named_parameters()`
        order and a callable's arms come in order of first appearance. Embeddings come first, the head last, a
        parameter shared by several modules at its lowest place.

    Raises:
        ValueError: no parameter is trainable, or the granularity is unknown or returns no name.
    """
    if not callable(granularity):
        check_name("granularity", granularity, GRANULARITIES, callable_too=True)
    places, layout = places_of(model)
    if not places:
        raise ValueError(
            "the model has no trainable parameter; pass a peft_config, or a PeftModel whose adapter is trainable "
            "(PeftModel.from_pretrained(..., is_trainable=True))."
        )
    if granularity == "block" and not layout.stacks:
        _tell_of_no_blocks(model)
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(_arm_name(place, granularity), []).append(place)
    sites = sites_of(model, [place.parameter for place in places])
    anchors = {name: [anchor for m in members for anchor in m.anchors] for name, members in groups.items()}
    arms = [_arm(name, members, sites, layout.depth(anchors[name])) for name, members in groups.items()]
    if granularity in ("block", "module") and layout.stacks:
        arms.sort(key=lambda arm: -1 if arm.depth is None else arm.depth)  # stable
    buffered = {name: module for name, module in model.named_modules() if module._buffers}
    devices = list({p.device: 1 for p in model.parameters()})
    return Arms(arms, layout, anchors, buffered, rank_allocators(model), gathering_modules(model), devices)


def _tell_of_no_blocks(model: nn.Module) -> None:
    """Say once for each model that nothing in its blocks is trained, and what follows."""
    if model not in _told:
        _told.add(model)
        logger.warning(
            "%s trains nothing in a stack of transformer blocks (prompts, prefixes and heads lie outside), so each of "
            "its trained modules is one arm, as with granularity='module', and passes are not cut.",
            type(model).__name__,
        )


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


def _arm(name: str, members: list[Place], sites: Sites, depth: int | None) -> Arm:
    return Arm(
        name=name,
        parameter_names=tuple(m.name for m in members),
        parameters=tuple(m.parameter for m in members),
        sites=tuple(tuple(sites[m.parameter]) for m in members),
        depth=depth,
    )


def check_partition(arms: Sequence[Arm]) -> None:
    """Refuse arms that are none, or that hold a parameter twice.

    Raises:
        ValueError: they are; the message names the parameter.
    """
    if not len(arms):
        raise ValueError("there are no arms; arms_of(model) needs a model with trainable parameters.")
    seen: set[nn.Parameter] = set()
    for arm in arms:
        for name, parameter in zip(arm.parameter_names, arm.parameters, strict=True):
            if parameter in seen:
                raise ValueError(f"{name} comes twice in the arms; each parameter belongs to one arm.")
            seen.add(parameter)
