"""Training, validation and test split of a set of examples, fixed by a hash of each one and by nothing else."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from slsam_peft.errors import UserError

if TYPE_CHECKING:
    from slsam_peft.data.scoring import Pair

Example = TypeVar("Example")
Other = TypeVar("Other")

TEST_PERCENT, VALIDATION_PERCENT = 25, 15  # the rest is for training


@dataclass(frozen=True)
class Splits(Generic[Example]):
    """Examples of a task. No two splits share a text, and only the training examples depend on a seed."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def map(self, convert: Callable[[Example], Other]) -> "Splits[Other]":
        """Return the splits with every example converted."""
        return Splits(*([convert(example) for example in part] for part in (self.train, self.validation, self.test)))


@dataclass(frozen=True)
class Sizes:
    """How many examples are asked for; all of a split where its number is missing."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


ALL = Sizes()


def user_asks(question: str, answer: str) -> "Pair":
    """Return a pair of one user message and its answer."""
    return [{"role": "user", "content": question}], answer


def split(
    what: str, examples: Iterable[Example], text: Callable[[Example], str], sizes: Sizes, seed: int
) -> Splits[Example]:
    """Split examples by their text and take the numbers that are asked for.

    Texts that differ in case or white space only count as one. Where several examples share a text they go to the
    same split.

    Args:
        what (`str`): What they are, for the message.
        examples (`Iterable`): All examples.
        text (`Callable`): The text of an example that no two splits may share.
        sizes (`Sizes`): How many are taken: held-out ones in an order of the hash, training ones drawn with `seed`.
        seed (`int`): Seed of the training examples' choice and order.

    Raises:
        UserError: more are asked for than there are, or none.
    """
    pools: Splits[tuple[str, Example]] = Splits([], [], [])
    for example in examples:
        digest = hashlib.sha256(" ".join(text(example).casefold().split()).encode()).hexdigest()
        place = int(digest[:8], 16) % 100
        if place < TEST_PERCENT:
            pools.test.append((digest, example))
        elif place < TEST_PERCENT + VALIDATION_PERCENT:
            pools.validation.append((digest, example))
        else:
            pools.train.append((digest, example))

    # An order by hash is a fixed random one, so the first test examples are as good as all of them.
    def take(name: str) -> list[Example]:
        pool = [example for _, example in sorted(getattr(pools, name), key=lambda pair: pair[0])]
        asked = getattr(sizes, name)
        if asked is None:
            asked = len(pool)
        if not 1 <= asked <= len(pool):
            raise UserError(f"{what}: {asked} {name} rows are not to be had; 1 to {len(pool)} are.")
        return random.Random(seed).sample(pool, asked) if name == "train" else pool[:asked]

    return Splits(take("train"), take("validation"), take("test"))
