"""The state of objects that users give in the place of a name."""

from typing import Any

import torch


def own_state(given: Any) -> dict[str, torch.Tensor]:
    """Return the state of an object that a user gave for a name; empty where it has none."""
    return dict(given.state_dict()) if hasattr(given, "state_dict") else {}


def load_own_state(given: Any, state: dict[str, torch.Tensor]) -> None:
    """Hand such an object its state back.

    Raises:
        ValueError: there is a state, and the object takes none.
    """
    if hasattr(given, "load_state_dict"):
        given.load_state_dict(state)
    elif state:
        raise ValueError(f"the state holds {', '.join(map(repr, state))}, and {given!r} has no load_state_dict.")
