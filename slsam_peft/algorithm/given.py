"""The state of objects that users give in the place of a name."""

from collections.abc import Mapping
from typing import Any

import torch


def takes_state(given: Any) -> bool:
    """Whether an object that a user gave for a name can be handed a state back."""
    return hasattr(given, "load_state_dict")


def own_state(given: Any) -> dict[str, torch.Tensor]:
    """Return the state of an object that a user gave for a name; empty where it has none.

    The tensors are copies: an object may go on writing into those that it hands out.
    """
    state = given.state_dict() if hasattr(given, "state_dict") else {}
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def load_own_state(given: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Hand such an object its state back.

    Raises:
        ValueError: there is a state, and the object takes none; or it looks for something that the state lacks.
    """
    if not takes_state(given):
        if state:
            raise ValueError(f"the state holds {', '.join(map(repr, state))}, and {given!r} has no load_state_dict.")
        return
    try:
        given.load_state_dict(dict(state))
    except KeyError as error:
        raise ValueError(f"the state has no {error}, which {type(given).__name__} keeps.") from error
