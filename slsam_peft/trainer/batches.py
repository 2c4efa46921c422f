"""Looks at a trainer's batches as they come."""

from collections.abc import Iterator, Mapping
from typing import Any


class Lookahead(Iterator):
    """Batches in order, with a look at the one that comes next.

    Args:
        batches (`Iterator`): The batches.

    Attributes:
        coming (`dict` or `None`): The batch that `next` will return; `None` behind the last one.
    """

    def __init__(self, batches: Iterator) -> None:
        self.batches = batches
        self.coming = next(batches, None)

    def __next__(self) -> Any:
        if self.coming is None:
            raise StopIteration
        batch, self.coming = self.coming, next(self.batches, None)
        return batch


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return `(batch, length)` of a micro-batch."""
    sequences, length = inputs["input_ids"].shape[:2]
    return int(sequences), int(length)
