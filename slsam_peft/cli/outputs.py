"""Files a subcommand writes at its end are checked before its work, and written whole or not at all."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slsam_peft.errors import UserError
from slsam_peft.extras import require

PLOT_SUFFIXES = (".png", ".svg")
DPI = 150


def check_outputs(paths: Sequence[Path | None], force: bool, plot: Path | None = None) -> None:
    """Check that files can be written, and leave everything as it was.

    Args:
        paths (`Sequence[Path | None]`): The files; `None` for one that was not asked for.
        force (`bool`): Whether existing ones may be overwritten.
        plot (`Path`, *optional*): The one that is a picture, PNG or SVG.

    Raises:
        UserError: one exists already, is a folder, or cannot be made where it is to be; a picture without matplotlib.
    """
    if plot is not None:
        require("--plot", "plot", "matplotlib")
    for path in (*paths, plot):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it.")
        if path.exists() and not force:
            raise UserError(f"{path} exists already. Name another file, or pass --force to overwrite it.")
        _check_folder(path)
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {plot}: the name must end in {' or '.join(PLOT_SUFFIXES)}.")


def check_appendable(path: Path) -> None:
    """Check that lines can be added to a file, which need not exist, and leave everything as it was.

    Raises:
        UserError: they cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    _check_folder(path)
    if path.exists():
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise _unwritable(path, error) from error


def _check_folder(path: Path) -> None:
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"the folder of {path} does not exist. Make it first, or name another file.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file; an earlier one is replaced whole, or stays as it was.

    Raises:
        UserError: it cannot be written.
    """
    from slsam_peft.saving.atomic import write_atomically

    try:
        write_atomically(path, content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG or SVG, as `write_output` writes.

    Raises:
        UserError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format=path.suffix[1:])
    write_output(path, content.getvalue())


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror or error}. Name another file, or free some space.")
