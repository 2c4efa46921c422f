"""The methods that are compared on somebody's own data: their names and their settings. Imports no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

PLAIN, AUTO = "plain", "auto"
SMALL_STEPS = 8  # sequences


class Fewer(NamedTuple):
    """Plain LoRA with fewer steps.

    Args:
        name (`str`): Of the method, as in recipes/compare.
        short (`str`): What it is called beside the others.
        share (`float`): `MethodSettings.steps_share`.
        parts (`int`): The steps of plain LoRA are so many times its own.
    """

    name: str
    short: str
    share: float
    parts: int


# In steps of four sequences a third of them lowered the loss of fitted rows about as much as SL-SAM did (raters.yaml
# and fresh.yaml in recipes/compare); in steps of sixteen half of them did (fresh_batch16.yaml), and a third did not
# (auto_batch16.yaml).
THIRD = Fewer("plain, a third of the steps", "a third of the steps", 0.3333, 3)
HALF = Fewer("plain, half of the steps", "half of the steps", 0.5, 2)
FEWER = {fewer.name: fewer for fewer in (THIRD, HALF)}


def fewer_steps(steps: int, batch_size: int, rows: int) -> Fewer | None:
    """Return how plain LoRA is trained with fewer steps; `None` where that would leave rows out.

    Of the last rows, fewer than a batch has may be left out.

    Args:
        steps (`int`): Of the other methods.
        batch_size (`int`): Sequences of a step.
        rows (`int`): Training rows.
    """
    fewer = THIRD if batch_size <= SMALL_STEPS else HALF
    return fewer if steps * batch_size >= fewer.parts * rows else None


def are_own(methods: Sequence[str]) -> bool:
    """Return whether methods of these names are those that are compared on somebody's own data, in their order."""
    return tuple(methods[:2]) == (PLAIN, AUTO) and (len(methods) == 2 or (len(methods) == 3 and methods[2] in FEWER))


def settings_of(method: str) -> dict[str, Any]:
    """Return what `MethodSettings` holds of a method beside its learning rates."""
    if method == AUTO:
        return {"slsam": {"method": "auto"}}
    return {"steps_share": FEWER[method].share} if method in FEWER else {}


def title(method: str) -> str:
    """Return what a method is called where it is advised."""
    names = {PLAIN: "plain LoRA", AUTO: "SL-SAM (method: auto)"}
    return names.get(method) or f"plain LoRA with {FEWER[method].short}"


def short(method: str) -> str:
    """Return what a method is called beside the others."""
    return {PLAIN: "plain LoRA", AUTO: "SL-SAM"}.get(method) or FEWER[method].short


def that_of(method: str) -> str:
    """Return a method's name as the owner of a loss that the sentence has named."""
    return f"that of {short(method)}" if method in FEWER else f"{short(method)}'s"
