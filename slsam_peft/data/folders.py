"""Tells which files of a local folder belong to which split."""

import logging
import re
from pathlib import Path

from slsam_peft.data.files import ALLOWED, suffix_of
from slsam_peft.errors import UserError

logger = logging.getLogger(__name__)

# These are never part of a name on the Hub, where "OpenHermes-2.5" has a suffix too.
OTHER_DATA = (".arrow", ".csv", ".gz", ".pkl", ".tsv", ".txt", ".xlsx", ".zip", ".zst")

# The words of a file's or folder's name that say a split, as `datasets` has them.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![a-z])")


def files_by_split(folder: Path, config: str | None = None) -> dict[str, list[Path]]:
    """Return the data files of each split, in order; the folder's card decides where it declares them.

    Args:
        folder (`Path`): The folder.
        config (`str`, *optional*): One of the configurations that the card declares.

    Raises:
        UserError: there is no file that can be read, or files of several types.
    """
    found = _by_card(folder, config) if config is not None or _has_card(folder) else _by_name(folder)
    if not found:
        raise UserError(
            f"data folder {folder} cannot be read: it holds no data file.\nIt needs files of one of these types: "
            f"{ALLOWED}; 'train' or 'test' in a file's name says which split it belongs to."
        )
    for split, files in found.items():
        kinds = {suffix_of(file) == ".parquet" for file in files if suffix_of(file)}
        if len(kinds) > 1:
            raise UserError(
                f"data folder {folder}, split {split!r}, holds JSON and Parquet files; bring all into one of the two."
            )
    return found


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return header is not None and re.search(r"^configs:", header[1], re.MULTILINE) is not None


def _by_card(folder: Path, config: str | None) -> dict[str, list[Path]]:
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(str(folder), config).config.data_files or {}
    except Exception as error:  # datasets raises a dozen kinds
        detail = "\n".join(line[:300] for line in str(error).strip().splitlines()[:3])
        raise UserError(f"data folder {folder} cannot be read as its README.md says: {detail}") from error
    return {str(split): [Path(file) for file in listed] for split, listed in files.items()}


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Sort files by the words in their names, or else in their folders'; without any, all are for training."""
    usable: list[Path] = []
    others: list[str] = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if not file.is_file() or any(part.startswith((".", "__")) for part in inside.parts):
            continue
        if suffix_of(file):
            usable.append(file)
        elif file.suffix.lower() in OTHER_DATA:
            others.append(inside.as_posix())
    named = [(file, _split_of(file.relative_to(folder))) for file in usable]
    found: dict[str, list[Path]] = {}
    if any(split for _, split in named):
        for file, split in named:
            if split:
                found.setdefault(split, []).append(file)
            else:
                others.append(file.relative_to(folder).as_posix())
    elif usable:
        found = {"train": usable}
    if found and others:
        logger.warning(
            "Of the data folder %s these files are not read: %s. Files of %s are, and where one has a split's name, "
            "train or test, all need one.",
            folder,
            ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
            ALLOWED,
        )
    return found


def _split_of(inside: Path) -> str:
    """Return the split that the nearest name says; an empty text where none does."""
    stem = inside.name.partition(".")[0] if "." in inside.name[1:] else inside.name
    for name in (stem, inside.name, *reversed(inside.parent.parts)):
        words = _WORD.findall(name.lower())
        if words:
            return _SPLIT_OF[words[0]]
    return ""
