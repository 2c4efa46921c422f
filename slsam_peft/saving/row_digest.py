"""Tells a run's training rows from others, by their number and a few of them."""

import hashlib
import json
from collections.abc import Mapping, Sized
from typing import Any

import torch

SAMPLED_ROWS = 64  # at most, spread over the dataset


def describe_rows(dataset: Any) -> dict[str, int | str]:
    """Return how many rows a dataset has and a digest of some: texts and integers, not images or sound.

    Args:
        dataset (`Dataset`): What a trainer was given, as it prepared it.

    Returns:
        `dict[str, int | str]`: `rows` and `rows_digest`. Empty for a stream, and for rows that are made when they are
            read, as each reading may give others.
    """
    made_when_read = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or made_when_read:
        return {}
    count = len(dataset)
    places = sorted({i * count // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}) if count else []
    digest = hashlib.sha256()
    for place in places:
        digest.update(json.dumps(_plain(dataset[place]), sort_keys=True).encode())
    return {"rows": count, "rows_digest": digest.hexdigest()[:16]}


def _plain(value: Any) -> Any:
    """Return a row's texts and integers in the order of their columns, and `None` for anything else."""
    if isinstance(value, torch.Tensor):
        return None if value.is_floating_point() else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int) else None
