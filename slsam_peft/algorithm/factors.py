r"""Low-rank pairs beside the frozen weights they adapt: $W x + s\, B A x$.

Rules that measure, balance, double or disturb the product $s\,B A$, or $W + s\,B A$, work on these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slsam_peft.algorithm.arms import Arm
from slsam_peft.algorithm.stack import Pair


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank pair with its scale and what it adapts.

    Args:
        name (`str`): Name of the adapted module, for messages.
        pair (`Pair`): The modules of $A$ and $B$.
        scale (`float`, *optional*, defaults to `1.0`): $s$; LoRA's alpha over its rank.
        base (`nn.Module`, *optional*): The frozen linear module $W$, quantised or not.
        weight (callable, *optional*): Returns $W$, shape `(out, in)`, not to be written; dequantised where it is
            quantised. `None` where it cannot be had.
        computes_in (callable, *optional*): Returns the dtype that a quantised module computes in, given its input;
            `None`, from it or in its place: the input's own.
    """

    name: str
    pair: Pair
    scale: float = 1.0
    base: nn.Module | None = None
    weight: Callable[[], torch.Tensor] | None = None
    computes_in: Callable[[torch.Tensor], torch.dtype | None] | None = None

    @property
    def down(self) -> nn.Parameter:
        """$A$, shape `(r, in)`."""
        return self.pair.weights[0]

    @property
    def up(self) -> nn.Parameter:
        """$B$, shape `(out, r)`."""
        return self.pair.weights[1]


def product_norm_squared(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    r"""Return $\|B A\|_F^2$ from the Gram matrices of the factors, shape `()`; the product itself is not made.

    Args:
        up (`torch.Tensor`): $B$, shape `(out, r)`.
        down (`torch.Tensor`): $A$, shape `(r, in)`.
    """
    return ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0.0)


def check_factors(what: str, arms: Sequence[Arm], factors: Sequence[Factors]) -> None:
    """Refuse arms with a parameter that belongs to no pair.

    Args:
        what (`str`): What needs the pairs, for the message.
        arms (`Sequence[Arm]`): The arms.
        factors (`Sequence[Factors]`): The pairs.

    Raises:
        ValueError: there is one; the message names it.
    """
    known = {weight for pair in factors for weight in pair.pair.weights}
    named = ((n, p) for arm in arms for n, p in zip(arm.parameter_names, arm.parameters, strict=True))
    missing = next((name for name, p in named if p not in known), None)
    if missing is not None:
        raise ValueError(
            f"{what} works on the product of LoRA's factors, and {missing} is no factor of a plain pair on a linear "
            "module; train LoRA factors alone (no DoRA, biases, embeddings or modules_to_save), or use another rule. "
            "In a loop of your own pass SLSAM(..., factors=slsam_peft.trainer.factors.factors_of(model))."
        )
