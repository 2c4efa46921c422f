"""Knows whose an object is that was handed over in the place of a name, where it may keep something between steps.

Such an object serves one algorithm at a time, the one that was made last with it; an ascent begins anew for that one.
Making an algorithm again with the same settings is fine, then, and so is reading the object; an earlier algorithm that
would go on with what another one has left there is refused. Objects are not copied: users read theirs, and some hold
what cannot be copied.
"""

import copy
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import WeakValueDictionary

from slsam_peft.algorithm.ascents import Ahead, Ascent, Part, Remembered, TwoPass
from slsam_peft.algorithm.radius import Adaptive, Length, LossRise, Neuron, WeightSpace
from slsam_peft.algorithm.zeroth_order import ZerothOrder

# These keep nothing: one object serves any number of algorithms. Classes derived from them may keep something.
SHARED = (Ascent, TwoPass, Part, Ahead, Remembered, ZerothOrder, Length, LossRise, Adaptive, Neuron, WeightSpace)

# By the address of an object, which whoever owns it keeps alive.
_owners: WeakValueDictionary[int, "Ownership"] = WeakValueDictionary()


class Ownership:
    """What of an algorithm's rules is its own, from now on and until another one takes it.

    Args:
        *given (`Any`): Its rules: names, functions and objects. Names, functions and what keeps nothing are nobody's.
    """

    def __init__(self, *given: Any) -> None:
        self._owned = [owned for owned in map(_holder, given) if _may_keep(owned)]
        for owned in self._owned:
            _owners[id(owned)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ownership":
        """Give a copied algorithm the copies of them."""
        return Ownership(*copy.deepcopy(self._owned, memo))

    def check(self) -> None:
        """Refuse to go on where another algorithm has taken one of them.

        Raises:
            ValueError: one has; the message names its class.
        """
        lost = next((owned for owned in self._owned if _owners.get(id(owned)) is not self), None)
        if lost is not None:
            name = type(lost).__name__
            raise ValueError(
                f"the {name} that this SLSAM was made with has been handed to another SLSAM or trainer since, and "
                f"what it keeps is no longer this one's; one object serves one training at a time. Make one {name} "
                "for each, in an SLSAMConfig of its own, or make this SLSAM (its trainer: train()) anew."
            )


def _holder(given: Any) -> Any:
    """Return what keeps the state of a rule: the object of a bound method, what is below a partial."""
    while isinstance(given, partial | MethodType):
        given = given.func if isinstance(given, partial) else given.__self__
    return given


def _may_keep(given: Any) -> bool:
    """Whether an object may keep something from step to step."""
    return not isinstance(given, str | FunctionType | BuiltinFunctionType | type | None) and type(given) not in SHARED
