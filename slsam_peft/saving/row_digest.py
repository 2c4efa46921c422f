"""Tells a run's training rows from others, by their number and a digest of some."""

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLED_ROWS = 1024  # at most, spread over the dataset
_DECODED = ("Image", "Audio", "Video", "Pdf")  # features that are read from files, at a price

logger = logging.getLogger(__name__)


def describe_rows(dataset: Any) -> dict[str, int | str]:
    """Return how many rows a dataset has and a digest of up to 1024 of them, pictures and sounds left out.

    Args:
        dataset (`Dataset`): What a trainer was given, as it prepared it.

    Returns:
        `dict[str, int | str]`: `rows` and `rows_digest`. Empty for anything but a table of `datasets`, as rows that
            are made when they are read may be others each time, and for one that cannot be read.
    """
    from datasets import Dataset  # a second to import, for commands that only read a record

    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return {}
    try:
        return _described(dataset)
    except Exception:  # a column of any kind: neither saving nor resuming may fail for it
        logger.debug("The rows cannot be described.", exc_info=True)
        return {}


def _described(dataset: "Dataset") -> dict[str, int | str]:
    kept = [name for name, kind in dataset.features.items() if not any(f"{k}(" in repr(kind) for k in _DECODED)]
    count = len(dataset)
    places = sorted({i * count // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}) if count else []
    columns = dataset.select_columns(kept).with_format(None).select(places)[:]
    written = json.dumps(columns, sort_keys=True, default=lambda value: None)  # bytes, times
    return {"rows": count, "rows_digest": hashlib.sha256(written.encode()).hexdigest()[:16]}
