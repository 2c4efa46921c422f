"""Turns the names of ascents into the objects that they stand for."""

from slsam_peft.algorithm.adversary import Adversary
from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, Remembered, Sampa, TwoPass, ZerothOrder
from slsam_peft.algorithm.balancing import Balancing
from slsam_peft.algorithm.noise import WeightNoise


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
    parts = {"partial": Part, "ahead": Ahead, "sampa": Sampa, "zeroth_order": ZerothOrder}
    if name in parts:
        return parts[name](sequences, fraction)
    if name in ("bar", "obar"):
        return Balancing(by_gradients=name == "bar")
    return {"two_pass": TwoPass, "remembered": Remembered, "bi_lora": Adversary, "flat_lora": WeightNoise}[name]()
