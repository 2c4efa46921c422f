"""Loads training and evaluation data from local files, folders or the Hub, checked before anything is trained."""

import glob
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsam_peft.data.columns import features, stored
from slsam_peft.data.files import SUFFIXES, Table, check_files, check_rows, read_rows, suffix_of
from slsam_peft.data.folders import OTHER_DATA, files_by_split
from slsam_peft.data.places import in_files, in_parts, remember
from slsam_peft.data.rows import TEMPLATE_OPTIONS, TOOLS
from slsam_peft.data.spellings import Converter, Row, deciding_columns
from slsam_peft.data.tables import changed, is_table
from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

STDLIB_DOCS = "stdlib_docs"  # a name that needs no network: see slsam_peft.data.stdlib_docs

FILE_SUFFIXES = (*SUFFIXES, *OTHER_DATA)
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


class NoSplitError(UserError):
    """A data set has no split of the name that was asked for."""


def load_split(
    name: str,
    split: str | None = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
) -> "Dataset | IterableDataset":
    """Load one split of a data set.

    Every row is checked first; of a data set from the Hub that is streamed, the first row. Rows in another usual
    spelling are converted, see `slsam_peft.data.spellings`, which is logged.

    Args:
        name (`str`): A `.json`, `.jsonl`, `.ndjson` or `.parquet` file, packed by gzip or not, a folder of such files
            (splits by file name, as in `datasets.load_dataset`) or one from `save_to_disk`, a data set's name on the
            Hub, or `"stdlib_docs"`. A file has the one split `"train"`.
        split (`str` or `None`, *optional*, defaults to `"train"`): A split, or a part of one: `"train[:90%]"`. `None`
            takes the only split of a file or folder, or `"train"` where it has several, which is said.
        config (`str`, *optional*): The data set's configuration.
        streaming (`bool`, *optional*, defaults to `False`): Read while training instead of beforehand.
        text_field (`str`, *optional*, defaults to `"text"`): Name of the plain text column.

    Returns:
        `Dataset` or `IterableDataset`: The rows. Their values are those of the file, whatever their types.

    Raises:
        UserError: the data cannot be found or read, are empty, or rows are not what `SFTTrainer` takes. The message
            names the file and the line, and what to do.
    """
    # What exists here comes before what has the same name elsewhere.
    path = Path(name).expanduser()
    if name == STDLIB_DOCS and not path.exists():
        return _stdlib_docs(split or "train")
    if path.is_dir():
        return _from_folder(path, split, config, streaming, text_field)
    if is_file_name(name):
        return _from_files(path, {"train": [path]}, split, streaming, text_field)
    return _from_hub(name, split or "train", config, streaming, text_field)


def is_file_name(name: str) -> bool:
    """Return whether `name` can only be a local file: it exists, or it is spelled as no name on the Hub is."""
    path = Path(name).expanduser()
    spelled_as_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    return path.is_file() or spelled_as_path or path.suffix.lower() in FILE_SUFFIXES


def _stdlib_docs(split: str) -> "Dataset":
    from slsam_peft.data.stdlib_docs import stdlib_docs

    splits: Any = stdlib_docs()
    return _part(splits, split, STDLIB_DOCS)


def _part(splits: Mapping[str, "Dataset"], split: str, what: str) -> "Dataset":
    """Return what `split` names, as `datasets.load_dataset` reads it: `"train[:90%]"`, `"train+test"`.

    Raises:
        UserError: there is no such split, or nothing is in that part of it.
    """
    from datasets import ReadInstruction, concatenate_datasets

    have = (
        f"it has {' and '.join(map(repr, splits))}, or parts of them such as 'train[:96]' ('train[:90%]', and "
        "'train[90%:]' to evaluate). A held-out file can be named as the evaluation split."
    )
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise NoSplitError(f"data set {what!r} has no split {split!r}; {have}") from error
    if sum(max(0, part.to - part.from_) for part in parts) == 0:
        raise UserError(f"data set {what!r} has no split {split!r}; that corresponds to no data, and {have}")
    chosen = []
    for part in parts:
        rows = splits[part.splitname]
        whole = (part.from_, part.to) == (0, len(rows))
        chosen.append(rows if whole else rows.select(range(part.from_, part.to)))
    if len(chosen) == 1 and chosen[0] is splits[parts[0].splitname]:
        return chosen[0]
    made = chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
    return remember(made, in_parts([(splits[part.splitname], part.from_, part.to) for part in parts]))


def _from_folder(
    path: Path, split: str | None, config: str | None, streaming: bool, text_field: str
) -> "Dataset | IterableDataset":
    """Load a split of a folder of files, or of one from `save_to_disk`; see `_only` where it is `None`."""
    if any((path / file).is_file() for file in _SAVED):
        return _saved(path, split, streaming, text_field)
    return _from_files(path, files_by_split(path, config), split, streaming, text_field)


def _only(path: Path, splits: Mapping[str, Any]) -> str:
    """Return which split of a folder is taken where none is named: the only one, or else `"train"`, which is said."""
    if len(splits) == 1:
        return next(iter(splits))
    if "train" in splits:
        logger.warning("The folder %s has the splits %s; 'train' is read.", path, " and ".join(map(repr, splits)))
    return "train"


def _from_files(
    path: Path, files: Mapping[str, Sequence[Path]], split: str | None, streaming: bool, text_field: str
) -> "Dataset | IterableDataset":
    """Load local files: those of JSON by this package's own reader, those of Parquet by `datasets`."""
    split = split or _only(path, files)
    wanted = [name for name in dict.fromkeys(re.findall(r"(?:^|\+)\s*(\w+)", split)) if name in files]
    if streaming:
        if split not in files:
            raise NoSplitError(
                f"data set {str(path)!r} has no split {split!r} that can be streamed; take {list(files)}."
            )
        return _table(files[split], text_field, streaming=True)
    # A split that is not asked for is not read; its name alone is told.
    found = {name: _table(files[name], text_field) for name in wanted}
    return _part(found or dict.fromkeys(files, ()), split, str(path))  # type: ignore[arg-type]


def _table(files: Sequence[Path], text_field: str, *, streaming: bool = False) -> Any:
    """Load all rows of files of one type."""
    found = check_files(files, text_field)
    _say(str(files[0]) if len(files) == 1 else str(files[0].parent), [*found.said, *found.empty])
    return remember(_rows_of(files, found, streaming, text_field), in_files(files, text_field))


def _rows_of(files: Sequence[Path], found: Table, streaming: bool, text_field: str) -> Any:
    if suffix_of(files[0]) == ".parquet":
        return _of_parquet(files, found, streaming, text_field)
    from datasets import Dataset, IterableDataset

    kind: Any = IterableDataset if streaming else Dataset
    options = {} if streaming else {"split": "train"}
    known = {
        # What a row becomes depends on these, and `datasets` keeps its copy of the rows under a hash of them.
        "files": tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "text_field": text_field,
        "columns": tuple(found.columns.items()),
        "version": importlib.metadata.version("slsam_peft"),
    }
    try:
        return kind.from_generator(_generate, features=features(found.columns), gen_kwargs=known, **options)
    except Exception as error:  # datasets raises a dozen kinds; a full disk is among them
        raise UserError(f"{files[0]} cannot be loaded: {_brief(error)}") from error


def _generate(
    files: tuple[tuple[str, int, int], ...], text_field: str, columns: tuple[tuple[str, Any], ...], version: str
) -> Iterator[dict[str, Any]]:
    convert, types = Converter(text_field), dict(columns)
    for file, _, _ in files:
        for _, row in read_rows(Path(file), text_field):
            yield stored(convert(row)[1], types)


def _of_parquet(files: Sequence[Path], found: Table, streaming: bool, text_field: str) -> Any:
    from datasets import load_dataset

    # Brackets in a name are that name's, and no pattern.
    names = [glob.escape(str(file)) for file in files]
    try:
        data: Any = load_dataset("parquet", data_files={"train": names}, split="train", streaming=streaming)
    except Exception as error:  # datasets raises a dozen kinds
        raise UserError(f"{files[0]} cannot be loaded: {_brief(error)}") from error
    return _converted(data, text_field) if found.said or _is_padded(data, text_field) else data


def _saved(path: Path, split: str | None, streaming: bool, text_field: str) -> "Dataset | IterableDataset":
    """Load what `save_to_disk` wrote; every row is checked."""
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except Exception as error:  # datasets raises a dozen kinds
        raise UserError(f"data folder {path} cannot be loaded by load_from_disk: {_brief(error)}") from error
    splits = {"train": data} if isinstance(data, Dataset) else {str(name): rows for name, rows in data.items()}
    split = split or _only(path, splits)
    part = _part(splits, split, str(path))
    made = _in_form(part, f"{path}, split {split!r}", text_field)
    return made.to_iterable_dataset() if streaming else made


def _from_hub(
    name: str, split: str, config: str | None, streaming: bool, text_field: str
) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    try:
        data = load_dataset(name, config, split=split, streaming=streaming)
        first = next(iter(data), None)
    except Exception as error:  # datasets raises a dozen kinds, network errors among them
        raise _refusal(name, split, error) from error
    if first is None:
        raise UserError(f"data set {name!r}, split {split!r}, is empty; it needs at least one row.")
    return _in_form(data, f"data set {name!r}, split {split!r}", text_field)


def _in_form(data: Any, where: str, text_field: str) -> Any:
    """Return a data set whose columns have types in TRL's spelling; every row is checked, of a stream the first one.

    Raises:
        UserError: a row is no training row; the message says which.
    """
    convert = Converter(text_field)
    rows = data
    if is_table(data):
        deciding = [name for name in data.column_names if name in deciding_columns(text_field)]
        rows = data.select_columns(deciding or data.column_names)
    numbered = ((f"{where}, row {i}", dict(row)) for i, row in enumerate(rows, 1))
    sample = rows is data  # a stream, of which the first row is looked at
    found = check_rows([next(numbered)] if sample else numbered, convert, typed=True, sample=sample)
    _say(where, [*found.said, *found.empty])
    decoded = _decoded_texts(data.features or {}, text_field)
    if decoded:
        logger.warning(
            "%s: datasets has decoded texts of %s that are JSON themselves, since that column holds values of several "
            "types: the text '007' is the number 7 now. Download the files and train on those.",
            where,
            " and ".join(map(repr, decoded)),
        )
    made = _converted(data, text_field) if found.said or _is_padded(data, text_field) else data
    return remember(made, lambda number: f"{where}, row {number}")


def _decoded_texts(declared: Mapping[str, Any], text_field: str) -> list[str]:
    """Return the columns with texts to train on that `datasets` stores as JSON, and cannot give back as they were."""
    from datasets import Json

    found = []
    for name, kind in declared.items():
        if name not in deciding_columns(text_field) or name in (TEMPLATE_OPTIONS, TOOLS):
            continue
        inner = getattr(kind, "feature", kind)  # of a list
        parts = [inner[key] for key in ("content", "value") if key in inner] if isinstance(inner, dict) else [kind]
        if any(isinstance(part, Json) for part in parts):
            found.append(name)
    return found


def _is_padded(data: Any, text_field: str) -> bool:
    """Return whether columns without any value would make TRL take the rows for others than they are."""
    if data.column_names is None or not is_table(data):  # a stream, of which one row has been seen
        return True
    _, made = Converter(text_field)(next(iter(data)))
    return set(made) != set(data.column_names) or TEMPLATE_OPTIONS in made


def _converted(data: Any, text_field: str) -> Any:
    return changed(data, partial(_as_trained, text_field), deciding_columns(text_field))


def _as_trained(text_field: str, row: Mapping[str, Any]) -> Row:
    return Converter(text_field)(row)[1]


def _say(where: str, sentences: Sequence[str]) -> None:
    for sentence in sentences:
        logger.warning("%s: %s", where, sentence)


def _refusal(what: str, split: str, error: Exception) -> UserError:
    detail = _brief(error)
    if "split" in detail.lower():
        return NoSplitError(
            f"data set {what!r} has no split {split!r}: {detail}\nName one that it has, a part of one "
            "('train[:90%]', and 'train[90%:]' to evaluate), or a held-out file as the evaluation split."
        )
    return UserError(
        f"data set {what!r} is no local file or folder (from {Path.cwd()}), and loading it from the Hub failed: "
        f"{detail}\nCheck the name, and the connection."
    )


def _brief(error: BaseException) -> str:
    """Return the message of the error that started it, a few lines at most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return "\n".join(line[:300] for line in lines[:3])
