"""Loads training and evaluation data from local files, folders or the Hub, checked before anything is trained."""

import os
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.data.files import SUFFIXES, check_file
from slsam_peft.data.rows import RowError, kind_of
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

STDLIB_DOCS = "stdlib_docs"  # a name that needs no network: see slsam_peft.data.stdlib_docs

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# These are never part of a name on the Hub, where "OpenHermes-2.5" has a suffix too.
_FILE_SUFFIXES = (*SUFFIXES, ".arrow", ".csv", ".gz", ".ndjson", ".pkl", ".tsv", ".txt", ".xlsx", ".zip", ".zst")


def load_split(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
) -> "Dataset | IterableDataset":
    """Load one split of a data set.

    Every row of local files is checked first; of a data set from the Hub, the first row.

    Args:
        name (`str`): A `.json`, `.jsonl` or `.parquet` file, a folder of such files (splits by file name, as in
            `datasets.load_dataset`), a data set's name on the Hub, or `"stdlib_docs"`. A file has the one split
            `"train"`.
        split (`str`, *optional*, defaults to `"train"`): A split, or a part of one: `"train[:90%]"`.
        config (`str`, *optional*): The data set's configuration.
        streaming (`bool`, *optional*, defaults to `False`): Read while training instead of beforehand.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `Dataset` or `IterableDataset`: The rows, unchanged.

    Raises:
        UserError: the data cannot be found or read, are empty, or rows are not what `SFTTrainer` takes. The message
            names the file and the line, and what to do.
    """
    # What exists here comes before what has the same name elsewhere.
    path = Path(name).expanduser()
    if name == STDLIB_DOCS and not path.exists():
        return _stdlib_docs(split)
    if path.is_dir():
        return _from_folder(path, split, config, streaming, text_field)
    if is_file_name(name):
        check_file(path, text_field)
        builder = _BUILDERS[path.suffix.lower()]
        return _load(
            str(path), split, text_field, path=builder, data_files={"train": [str(path)]}, streaming=streaming
        )
    return _load(name, split, text_field, path=name, name=config, streaming=streaming)


def load_eval_split(name: str, split: str, **options: Any) -> "Dataset | IterableDataset":
    """Load held-out data: a file or folder of its own where `split` names one, else a split of the data set `name`.

    Takes the keywords of `load_split` and raises as it does.
    """
    if is_file_name(split) or Path(split).expanduser().is_dir():
        options["config"] = None  # one of the data set `name`
        return load_split(split, "train", **options)
    return load_split(name, split, **options)


def is_file_name(name: str) -> bool:
    """Return whether `name` can only be a local file: it exists, or it is spelled as no name on the Hub is."""
    path = Path(name).expanduser()
    spelled_as_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    return path.is_file() or spelled_as_path or path.suffix.lower() in _FILE_SUFFIXES


def _stdlib_docs(split: str) -> "Dataset":
    from datasets import ReadInstruction, concatenate_datasets

    from slsam_peft.data.stdlib_docs import stdlib_docs

    data = stdlib_docs()
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in data.items()})
        return concatenate_datasets([data[part.splitname].select(range(part.from_, part.to)) for part in parts])
    except (ValueError, AssertionError, IndexError) as error:
        raise UserError(
            f"{STDLIB_DOCS} has no split {split!r}; it has 'train' and 'test', or parts of them such as 'train[:96]'."
        ) from error


def _from_folder(
    folder: Path, split: str, config: str | None, streaming: bool, text_field: str
) -> "Dataset | IterableDataset":
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(str(folder), config).config.data_files or {}
    except Exception as error:
        raise UserError(
            f"data folder {folder} cannot be read: {_brief(error)}\nIt needs files of one of these types: "
            f"{', '.join(SUFFIXES)}; 'train' or 'test' in a file's name says which split it belongs to."
        ) from error
    wanted = re.findall(r"(?:^|\+)\s*(\w+)", split)
    for file in chain.from_iterable(files.get(part, ()) for part in wanted):
        check_file(Path(file), text_field)
    return _load(str(folder), split, text_field, path=str(folder), name=config, streaming=streaming)


def _load(what: str, split: str, text_field: str, **arguments: Any) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    try:
        data = load_dataset(split=split, **arguments)
        first = next(iter(data), None)
    except Exception as error:  # datasets raises a dozen kinds, network errors among them
        raise UserError(_why(what, split, error)) from error
    if first is None:
        raise UserError(f"data set {what!r}, split {split!r}, is empty; it needs at least one row.")
    try:
        kind_of(first, text_field)
    except RowError as error:
        raise UserError(f"data set {what!r}, split {split!r}, row 1: {error.sentence}") from None
    return data


def _why(what: str, split: str, error: Exception) -> str:
    detail = _brief(error)
    if "split" in detail.lower():
        return (
            f"data set {what!r} has no split {split!r}: {detail}\nName one that it has, a part of one "
            "('train[:90%]', and 'train[90%:]' to evaluate), or a held-out file as the evaluation split."
        )
    if Path(what).exists():
        return f"{what} cannot be loaded: {detail}"
    return (
        f"data set {what!r} is no local file or folder (from {Path.cwd()}), and loading it from the Hub failed: "
        f"{detail}\nCheck the name, and the connection."
    )


def _brief(error: BaseException) -> str:
    """Return the message of the error that started it, a few lines at most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return "\n".join(line[:300] for line in lines[:3])
