"""Checks for packages that only some commands need, and names the extra of this package that brings them."""

from importlib.util import find_spec

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
