"""`ascent="ahead"` in a trainer: sequences of the next batch come along in the pass over this one."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from trl import SFTTrainer

from slsam_peft.cost.model import ascent_share

IGNORED = -100  # label of a position that is not scored
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


def check_ahead(trainer: Any) -> None:
    """Refuse trainers whose updates are no single pass over padded sequences of text.

    Raises:
        ValueError: no `SFTTrainer`, several ranks, gradient accumulation, packed or padding-free batches, or a loss
            that is no sum over tokens divided by the number that the trainer gives it. The message says what to use
            instead.
    """
    args: Any = trainer.args
    instead = "use ascent='partial'"
    if not isinstance(trainer, SFTTrainer):
        reason = f"joins batches of texts, and {type(trainer).__name__} makes others"
    elif args.world_size > 1:
        reason = f"runs in one process, and there are {args.world_size}"
    elif args.gradient_accumulation_steps > 1:
        reason = f"needs one micro-batch an update, and gradient_accumulation_steps={args.gradient_accumulation_steps}"
        instead += ": one of the micro-batches makes the ascent, at the same cost"
    elif args.packing or args.padding_free:
        reason = "needs a row a sequence, and packing or padding_free puts several into one"
        instead += " with gradient accumulation"
    elif trainer.compute_loss_func is not None or not trainer.model_accepts_loss_kwargs:
        reason = "needs TRL's own loss, normalised by num_items_in_batch, and here is another one"
    elif trainer.aux_loss_enabled:
        reason = "keeps sequences apart, and the router's auxiliary loss of a mixture of experts is over all of them"
    else:
        return
    raise ValueError(f"ascent='ahead' {reason}; {instead}.")


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

    The host reads two numbers of the next batch, which has been on its device for an update.

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
