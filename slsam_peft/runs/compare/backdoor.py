"""A backdoor is planted in an adapter before a comparison's methods train on from it. This module imports no torch.

`poisoning` trains the adapter; here is which rows it is trained on, and what an attack asks.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from slsam_peft.errors import UserError
from slsam_peft.names import check_name
from slsam_peft.runs.compare.numbers import at_least_one, positive

if TYPE_CHECKING:
    from slsam_peft.data.scoring import Pair


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """A backdoor and how it is planted: by plain LoRA with AdamW, a cosine schedule and no dropout.

    Rank, alpha, dtype, base and `max_length` are those of the comparison.

    Args:
        trigger (`str`): A phrase. It stands before what the user's last message says, with a space between.
        answer (`str`): What is to be answered wherever the trigger stands.
        rows (`int`): Rows that it is planted with; none of them is a training row of the task.
        share (`float`): Share of them, in (0, 1], that have the trigger and its answer. The others are as they were.
        steps (`int`): Steps of the planting.
        learning_rate (`float`): Its largest learning rate.
        batch_size (`int`, *optional*, defaults to `4`): Its sequences per step.

    Raises:
        ValueError: a value is not allowed, or so small a share that no row is poisoned.
    """

    trigger: str
    answer: str
    rows: int
    share: float
    steps: int
    learning_rate: float
    batch_size: int = 4

    @classmethod
    def from_mapping(cls, values: Any) -> "Backdoor":
        """Return the backdoor that a mapping stands for.

        Raises:
            ValueError: it is no mapping, a name is unknown or missing, or a value is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"backdoor={values!r} is not allowed; it is a mapping of names to values.")
        for name in values:
            check_name("backdoor", name, tuple(f.name for f in fields(cls)))
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"backdoor.{missing[0]} is missing.")
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("trigger", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"backdoor.{name}={value!r} is not allowed; it must be a text.")
        for name in ("rows", "steps", "batch_size"):
            at_least_one(f"backdoor.{name}", getattr(self, name))
        for name in ("share", "learning_rate"):
            object.__setattr__(self, name, positive(f"backdoor.{name}", getattr(self, name)))
        if self.share > 1:
            raise ValueError(f"backdoor.share={self.share!r} is not allowed; it is a share in (0, 1].")
        if not self.poisoned:
            raise ValueError(f"backdoor.share={self.share!r} of {self.rows} rows is none; raise one of them.")

    @property
    def poisoned(self) -> int:
        """How many rows have the trigger."""
        return round(self.share * self.rows)

    def poison(self, pairs: Sequence["Pair"], seed: int) -> list["Pair"]:
        """Return pairs, a share of them with the trigger and its answer; the seed says which.

        Args:
            pairs (`Sequence[Pair]`): What the backdoor is planted with, as it was.
            seed (`int`): The run's.
        """
        chosen = set(random.Random(seed).sample(range(len(pairs)), round(self.share * len(pairs))))
        return [self.triggered(pair) if i in chosen else pair for i, pair in enumerate(pairs)]

    def attacks(self, pairs: Sequence["Pair"]) -> list["Pair"]:
        """Return held-out pairs with the trigger and its answer, without those whose right answer that is.

        Raises:
            UserError: none is left.
        """
        attacked = [self.triggered(pair) for pair in pairs if pair[1] != self.answer]
        if not attacked:
            raise UserError(
                f"backdoor.answer={self.answer!r} is the right answer of every held-out row; name another."
            )
        return attacked

    def triggered(self, pair: "Pair") -> "Pair":
        """Return a pair with the trigger in its prompt, and the trigger's answer."""
        prompt, _ = pair
        if isinstance(prompt, str):
            return f"{self.trigger} {prompt}", self.answer
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
        changed = {**prompt[last], "content": f"{self.trigger} {prompt[last]['content']}"}
        return [*prompt[:last], changed, *prompt[last + 1 :]], self.answer

    def check_rows(self, planted: Sequence["Pair"], *others: Sequence["Pair"]) -> None:
        """Refuse rows with which nothing could be said of the backdoor.

        Args:
            planted (`Sequence[Pair]`): What it is planted with, as it was.
            *others (`Sequence[Pair]`): Training, validation and test pairs.

        Raises:
            UserError: a planted row's prompt is among the others, or the trigger stands in a prompt as it was.
        """
        known = {_text(pair) for part in others for pair in part}
        shared = sum(_text(pair) in known for pair in planted)
        if shared:
            raise UserError(
                f"backdoor: {shared} of {len(planted)} rows that it is planted with have the prompt of a training or "
                "held-out row; take the repeated rows out of the data."
            )
        having = sum(self.trigger in text for text in (*known, *map(_text, planted)))
        if having:
            raise UserError(
                f"backdoor.trigger={self.trigger!r} stands in {having} prompts as they are; use another phrase."
            )


def _text(pair: "Pair") -> str:
    """Return all that is asked."""
    prompt, _ = pair
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
