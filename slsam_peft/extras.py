"""Checks for packages that only some commands need, and says where what is fetched is kept."""

import os
from importlib.util import find_spec
from pathlib import Path

from slsam_peft.errors import UserError


def require(what: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        what (`str`): What needs them, as the beginning of a sentence.
        extra (`str`): The extra that brings them.
        *packages (`str`): Names to import.

    Raises:
        UserError: some are not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}; install the extra: pip install 'slsam-peft[{extra}]'.")


def cache_folder() -> Path:
    """Return this package's cache folder: `$XDG_CACHE_HOME/slsam_peft`, or `~/.cache/slsam_peft`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "slsam_peft"
