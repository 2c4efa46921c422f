"""Keeps what runs otherwise than it was meant to, where that changes what a step costs or computes."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Fallback(NamedTuple):
    """One of them.

    Args:
        what (`str`): What happens instead, a clause.
        why (`str`): For which reason, a clause.
        costs (`str`): What that costs, a sentence with its full stop.
    """

    what: str
    why: str
    costs: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.costs}"


class Fallbacks(Sequence[Fallback]):
    """What a training falls back to: each is told once, as a warning, and kept for the adapter's record.

    Args:
        logger (`logging.Logger`, *optional*): Who tells it. Defaults to this module's.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._found: dict[str, Fallback] = {}
        self._told: set[str] = set()

    def add(self, what: str, why: object, costs: str) -> None:
        """Keep a fallback and tell of it, unless the same has been told, for whatever reason.

        Args:
            what (`str`): As in `Fallback`; it says where, too, if there are several places.
            why (`object`): As in `Fallback`; an error says it by its message.
            costs (`str`): As in `Fallback`.
        """
        if what not in self._told:
            found = Fallback(what, str(why).rstrip("."), costs)
            self._told.add(what)
            self._found.setdefault(what, found)
            self._logger.warning("%s", found)

    def recall(self, found: Iterable[Fallback]) -> None:
        """Keep what an earlier part of the same training fell back to; it is told again where it happens again."""
        for fallback in found:
            self._found.setdefault(fallback.what, fallback)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index):  # noqa: D105
        return list(self._found.values())[index]

    def __iter__(self) -> Iterator[Fallback]:
        return iter(self._found.values())
