"""Makes batches as an ascent needs them: a part of one, or sequences of the next one behind those of this one."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from trl import DPOTrainer, RewardTrainer

from slsam_peft.cost.model import ascent_share
from slsam_peft.trainer.documents import IGNORED

FILLERS = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "position_ids": 0, "token_type_ids": 0}
NEEDED = ("input_ids", "attention_mask", "labels")


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


def ascent_part(inputs: Mapping[str, Any], fraction: float, stacked: int = 1) -> tuple[dict[str, Any], float]:
    """Return the first examples of a batch, and their share.

    Args:
        inputs (`Mapping`): A batch. Every tensor or list with one entry per example, or `stacked` of them, is cut.
        fraction (`float`): Share of the examples, in (0, 1]. It is rounded, and at least one is taken.
        stacked (`int`, *optional*, defaults to `1`): Sequences per example. They lie in as many equal parts along
            the first dimension: TRL puts chosen ones above rejected ones.

    Returns:
        `tuple[dict, float]`: The smaller batch and the share it really is.

    Raises:
        ValueError: the batch holds one example (packed and padding-free batches count as one).
    """
    sequences = next((v.shape[0] for k, v in inputs.items() if k in ("input_ids", "inputs_embeds", "labels")), 0)
    examples = sequences // stacked
    if examples < 2:
        raise ValueError(
            f"ascent='partial' cannot take a part of a batch of {examples} sequence (a packed or padding-free batch "
            "counts as one); use gradient_accumulation_steps > 1 (whole micro-batches are taken then), a larger "
            "per_device_train_batch_size, or ascent='two_pass'."
        )
    taken = max(1, round(fraction * examples))

    def cut(value: Any) -> Any:
        countable = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)
        if not countable or len(value) not in (sequences, examples):
            return value
        parts: Any = [value[start : start + taken] for start in range(0, len(value), examples)]
        if len(parts) == 1:
            return parts[0]
        return [x for part in parts for x in part] if isinstance(value, list) else torch.cat(parts)

    return {key: cut(value) for key, value in inputs.items()}, taken / examples


def sequences_per_example(trainer: Any) -> int:
    """Return how many sequences TRL stacks for each example: a chosen and a rejected one, or one."""
    return 2 if isinstance(trainer, DPOTrainer | RewardTrainer) else 1


class Joined(NamedTuple):
    """A batch with the first sequences of the next one behind its own.

    Args:
        inputs (`dict`): The joined batch.
        sequences (`tuple[int, int]`): How many sequences come from each.
        tokens (`int`): Tokens of the next batch's sequences, padding not counted.
    """

    inputs: dict[str, Any]
    sequences: tuple[int, int]
    tokens: int

    @property
    def own_share(self) -> torch.Tensor:
        """Share of the scored positions that is this batch's own, shape `()`, not read by the host."""
        scored = self.inputs["labels"][:, 1:] != IGNORED
        return scored[: self.sequences[0]].sum() / scored.sum().clamp(min=1)


def join(inputs: Mapping[str, Any], coming: Mapping[str, Any] | None, fraction: float) -> Joined:
    """Put the first sequences of the next batch behind those of this one.

    The host reads two numbers of the next batch, which has been on its device since the step before.

    Args:
        inputs (`Mapping`): This batch: tensors of shape `(batch, length)`.
        coming (`Mapping` or `None`): The next batch, on the same device; `None` where there is none.
        fraction (`float`): Share of its sequences, in (0, 1]; rounded, at least one.

    Raises:
        ValueError: a batch holds something else than such tensors.
    """
    own = len(inputs["input_ids"])
    if coming is None:
        return Joined(dict(inputs), (own, 0), 0)
    for batch in (inputs, coming):
        _check_batch(batch)
    taken = ascent_share(fraction, len(coming["input_ids"]))
    mask = coming["attention_mask"][:taken]
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    length, tokens = torch.stack([(columns * mask.any(0)).max(), mask.sum()]).tolist()
    pairs = {name: (value, coming[name][:taken, : max(1, length)]) for name, value in inputs.items()}
    return Joined({name: _stacked(pair, FILLERS[name]) for name, pair in pairs.items()}, (own, taken), tokens)


def _check_batch(batch: Mapping[str, Any]) -> None:
    shape = batch["input_ids"].shape
    wrong = [name for name in NEEDED if name not in batch]
    wrong += [k for k, v in batch.items() if k not in FILLERS or getattr(v, "shape", None) != shape]
    if wrong:
        raise ValueError(
            f"ascent='ahead' joins batches of {', '.join(FILLERS)}, each of shape (batch, length); {wrong[0]!r} is "
            "missing or something else. Use ascent='partial'."
        )


def _stacked(pair: tuple[torch.Tensor, torch.Tensor], filler: int) -> torch.Tensor:
    length = max(x.shape[1] for x in pair)
    return torch.cat([F.pad(x, (0, length - x.shape[1]), value=filler) for x in pair])
