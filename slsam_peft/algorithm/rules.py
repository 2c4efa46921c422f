"""Turns the names of ascents into the objects that they stand for, and refuses rules that cannot work on pieces."""

from typing import Any

from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, Remembered, TwoPass
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.fallbacks import Fallbacks
from slsam_peft.algorithm.noise import WeightNoise
from slsam_peft.algorithm.radius import AlongGradient
from slsam_peft.algorithm.sampa import Sampa
from slsam_peft.algorithm.shards import Shards
from slsam_peft.algorithm.zeroth_order import ZerothOrder
from slsam_peft.config import SLSAMConfig

_ASCENTS = {kind.rule: kind for kind in (TwoPass, Part, Ahead, Remembered, Sampa, ZerothOrder, Adversary, WeightNoise)}


def build_ascent(
    name: str | Ascent | None, sequences: int | None = None, fraction: float | None = None, rides: bool = False
) -> Ascent:
    """Return the ascent of a name, or the object that it is.

    Args:
        name (`str`, `Ascent` or `None`): As `SLSAMConfig.ascent`, resolved; `None` for none.
        sequences (`int`, *optional*): As in `Part`.
        fraction (`float`, *optional*): As in `Part`.
        rides (`bool`, *optional*, defaults to `False`): Whether `"auto"` may let sequences of the next batch ride
            along.
    """
    if not isinstance(name, str):
        return Ascent() if name is None else name
    if name == "auto":
        name = "ahead" if rides else "partial"
    if name in ("bar", "obar"):
        return Balancing(by_gradients=name == "bar")
    kind = _ASCENTS[name]
    return kind(sequences, fraction) if issubclass(kind, Part) else kind()


def check_sharded(ascent: Any, radius: Any, config: SLSAMConfig, shards: Shards, fallbacks: Fallbacks) -> None:
    """Refuse rules that may need whole weights or gradients, where a rank has pieces of them; tell what that costs.

    Args:
        ascent (`Ascent`): The rule that makes the ascent gradient.
        radius (`Radius`): The rule that makes e.
        config (`SLSAMConfig`): Resolved settings.
        shards (`Shards`): The sharded parameters.
        fallbacks (`Fallbacks`): Told that no pass is cut.

    Raises:
        ValueError: one of them is not known to work on pieces.
    """
    known = type(ascent) in (TwoPass, Part, Remembered)
    for name, fine in (("ascent", known), ("radius", isinstance(radius, AlongGradient))):
        if config.is_perturbed and not fine:
            raise ValueError(
                f"{name}={getattr(config, name)!r} may need whole weights, and parameters are sharded here (FSDP2): "
                "each rank has pieces. Use ascent='auto', 'two_pass' or 'partial' with a length or a loss rise, "
                "or DDP."
            )
    fallbacks.add(
        "passes are not cut",
        f"parameters are sharded over {shards.mesh.size()} ranks (FSDP2), which all run the same passes",
        "Every pass runs whole, and costs what that costs.",
    )
