"""Looks at a trainer's batches as they come."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

    @contextmanager
    def in_hand(self, loader: Any) -> Iterator[None]:
        """Let the loader be at its end no earlier than the batch in hand, inside the context.

        At the end accelerate takes what the last ranks gather for metrics to be of repeated rows, and leaves it out.

        Args:
            loader (`DataLoader` or `None`): What the batches come from, as accelerate has prepared it; `None` where
                it is at its end and has been left.
        """
        early = self.coming is not None and getattr(loader, "end_of_dataloader", False)
        if early:
            loader.end_of_dataloader = False
        try:
            yield
        finally:
            if early:
                loader.end_of_dataloader = True


def batch_shape(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return `(batch, length)` of a micro-batch."""
    sequences, length = inputs["input_ids"].shape[:2]
    return int(sequences), int(length)
