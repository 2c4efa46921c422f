"""Finds held-out data: a split of the data set that is trained on, or a file or folder of its own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.data.load import FILE_SUFFIXES, NoSplitError, is_file_name, load_split

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def load_eval_split(name: str, split: str, **options: Any) -> "Dataset | IterableDataset":
    """Load held-out data: a split of the data set `name`, or a file or folder of its own where `split` names one.

    Args:
        name (`str`): A data set, as of `load_split`.
        split (`str`): A split of it, or a part of one. What is spelled as a path, with a separator, a dot before it
            or the extension of a data file, is a file or folder instead; so is the name of one that lies here where
            the data set has no such split. The only split of a folder is taken, or `"train"` where it has several.
        **options: Keywords of `load_split`.

    Raises:
        UserError: as of `load_split`.
    """
    return _held_out(name, split, options)[1]


def eval_place(name: str, split: str) -> str | None:
    """Return the file or folder that `load_eval_split` reads, `None` where that is a split of the data set `name`.

    Raises:
        UserError: it has to read that split to know, and cannot.
    """
    if is_path(split):
        return split
    return _held_out(name, split, {})[0] if Path(split).expanduser().exists() else None


def _held_out(name: str, split: str, options: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the place of held-out data that are none of a data set's splits, and the data."""
    if not is_path(split):
        try:
            return None, load_split(name, split, **options)
        except NoSplitError:
            if not Path(split).expanduser().exists():
                raise
    # The configuration is one of the data set `name`.
    return split, load_split(split, None, **{**options, "config": None})


def is_path(split: str) -> bool:
    """Return whether an evaluation split is spelled as a path; that something of its name lies here tells nothing."""
    path = Path(split).expanduser()
    if path.suffix.lower() in FILE_SUFFIXES:
        return True
    return (split.startswith((".", "~")) or os.sep in split) and (is_file_name(split) or path.is_dir())
