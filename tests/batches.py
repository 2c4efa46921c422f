"""Batches of texts as trainers' collators make them, and what a model's loss on each text alone is."""

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.decoders import WORDS

IGNORED = -100


def texts(lengths, seed=0):
    """Return texts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, side="right", multiple=None):
    """Return a padded batch; the first token of a left-padded row is not predicted from its padding."""
    batch = DataCollatorForLanguageModeling(0, pad_to_multiple_of=multiple)([{"input_ids": row} for row in rows])
    if side == "right":
        return batch
    batch["labels"][:, 0] = IGNORED
    for name, value in batch.items():
        batch[name] = torch.stack([x.roll(value.shape[1] - len(r)) for x, r in zip(value, rows, strict=True)])
    return batch


def padding_free(rows, multiple=None):
    """Return TRL's flattened batch: one row, position ids that start again, boundaries, document numbers."""
    collator = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)
    return collator([{"input_ids": row} for row in rows])


def packed(rows, lengths):
    """Return what TRL makes of rows packed by `bfd`, each of several documents."""
    examples = [{"input_ids": row, "seq_lengths": sizes} for row, sizes in zip(rows, lengths, strict=True)]
    return DataCollatorForLanguageModeling(0, padding_free=True)(examples)


def flattening(rows, **settings):
    """Return transformers' flattened batch."""
    return DataCollatorWithFlattening(**settings)([{"input_ids": row} for row in rows])


def in_rows(groups):
    """Return documents in several rows of equal length, told apart by position ids alone."""
    ids = torch.tensor([[token for document in group for token in document] for group in groups])
    positions = torch.tensor([[i for document in group for i in range(len(document))] for group in groups])
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}


def pairs(chosen, rejected):
    """Return a batch of preference pairs as TRL's DPO trainer makes it: chosen rows above rejected ones."""
    batch = padded([*chosen, *rejected])
    batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
    batch["ref_chosen_logps"] = torch.arange(len(chosen), dtype=torch.float64)
    return batch


def token_losses(model, inputs):
    """Return the loss of every position but the last of each row, shape `(batch, length - 1)`, 0 where ignored."""
    passed = {k: v for k, v in inputs.items() if k not in ("labels", "completion_mask", "ref_chosen_logps")}
    passed = {k: v for k, v in passed.items() if not k.startswith(("cu_seq", "max_length", "seq_idx"))}
    logits = model(**passed, use_cache=False).logits
    labels = inputs.get("labels")
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED) if labels is None else labels
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(len(logits), -1)


def loss_alone(model, rows):
    """Return the summed loss of texts, each in a batch of its own."""
    alone = [torch.tensor([row]) for row in rows]
    return sum(token_losses(model, {"input_ids": ids, "labels": ids}).sum() for ids in alone)
