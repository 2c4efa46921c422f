"""`ascent="ahead"` in a trainer: sequences of the next batch come along in the pass over this one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from trl import SFTTrainer

from slsam_peft.cost import ascent_share

IGNORED = -100  # label of a position that is not scored


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
            that is not normalised by the number of tokens given to it. The message says what to use instead.
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
    elif not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
        reason = f"needs a loss that takes num_items_in_batch, and {type(trainer.model).__name__} has none"
    else:
        return
    raise ValueError(f"ascent='ahead' {reason}; {instead}.")


def joined(
    inputs: Mapping[str, Any], coming: Mapping[str, Any] | None, fraction: float
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Put the first sequences of the next batch behind those of this one.

    Args:
        inputs (`Mapping`): This batch: tensors of shape `(batch, length)`, padded at their end.
        coming (`Mapping` or `None`): The next batch, on the same device; `None` where there is none.
        fraction (`float`): Share of its sequences, in (0, 1]; rounded, at least one.

    Returns:
        `tuple[dict, tuple[int, int]]`: The joined batch, and how many sequences of it come from each.

    Raises:
        ValueError: the batch holds something else than such tensors.
    """
    own = len(inputs["input_ids"])
    if coming is None:
        return dict(inputs), (own, 0)
    taken = ascent_share(fraction, len(coming["input_ids"]))
    for name, value in inputs.items():
        if not (isinstance(value, torch.Tensor) and value.dim() == 2 and len(value) == own and name in coming):
            raise ValueError(
                f"ascent='ahead' joins batches of texts, and {name!r} is no tensor with a row for each of their "
                f"{own} sequences; use ascent='partial'."
            )
    mask = coming["attention_mask"][:taken]
    # Padding that these sequences do not need is cut off; on an accelerator that would have to wait for it.
    length = mask.shape[1] if mask.device.type != "cpu" else int(mask.sum(1).max())
    rows = {name: (value, coming[name][:taken, :length]) for name, value in inputs.items()}
    return {name: _stacked(pair, IGNORED if name == "labels" else 0) for name, pair in rows.items()}, (own, taken)


def _stacked(pair: tuple[torch.Tensor, torch.Tensor], filler: int) -> torch.Tensor:
    length = max(x.shape[1] for x in pair)
    return torch.cat([F.pad(x, (0, length - x.shape[1]), value=filler) for x in pair])


def scored_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return how many positions of `labels`, shape `(batch, length)`, are scored; shape `()`, not read by the host."""
    return (labels[:, 1:] != IGNORED).sum()
