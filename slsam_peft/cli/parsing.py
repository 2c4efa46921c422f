"""An argument parser whose errors are `UserError`s that name the nearest match."""

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from slsam_peft.config import hint_at
from slsam_peft.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string where none is close."""
    return hint_at(name, known)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError`, takes no abbreviations and accepts `--max-steps` too."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of leaving the process."""
        raise UserError(f"{message}\nSee `{self.prog} --help`.")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            UserError: an unknown flag (with the nearest match), a missing or a malformed value.
        """
        values, unknown = self.parse_known_args([_underscored(word) for word in argv])
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].partition("=")[0]
            self.error(f"{self.prog} does not know {unknown[0]!r}.{nearest(name, flags)}")
        return values


def _underscored(word: str) -> str:
    """Spell a flag's name as it was declared: `--max-steps=3` becomes `--max_steps=3`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
