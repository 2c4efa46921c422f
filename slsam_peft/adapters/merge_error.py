"""Measures how far a merged model is from the adapter on the base it was trained on."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from slsam_peft.adapters.load import Adapter, load_adapted
from slsam_peft.data.examples import load_examples
from slsam_peft.data.load import STDLIB_DOCS
from slsam_peft.data.scoring import score
from slsam_peft.models.load import Tell, load_model
from slsam_peft.saving.record import probe_logits


@dataclass(frozen=True)
class HeldOut:
    """Rows to take a held-out loss on, see `slsam_peft.data.examples.load_examples`."""

    name: str
    rows: int
    max_length: int


@dataclass(frozen=True)
class Outcome:
    """A merged model against the adapter as it was trained.

    Args:
        largest (`float`): Largest difference of a logit, over a probe of 16 tokens and the whole vocabulary.
        spread (`float`): Standard deviation of the trained logits, to hold that against.
        divergence (`float`): Mean Kullback-Leibler divergence of the next token's distribution, in nats.
        agreement (`float`): Share of the probe's positions with the same most likely token.
        loss (`float` or `None`): Held-out loss of an answer token, in nats.
    """

    largest: float
    spread: float
    divergence: float
    agreement: float
    loss: float | None


def measure(
    adapter: Adapter, folders: dict[str, Path], held_out: HeldOut | None, tell: Tell
) -> tuple[float | None, dict[str, Outcome]]:
    """Load one model after the other and compare.

    Args:
        adapter (`Adapter`): On its base as it was in training, it is what the others are compared with.
        folders (`dict[str, Path]`): Merged models, by what they are called.
        held_out (`HeldOut`, *optional*): Data.
        tell (callable): Is told of every model.

    Returns:
        `tuple`: The trained state's held-out loss, and the outcome of each folder.

    Raises:
        UserError: a model or the data cannot be read.
    """
    tell("Measuring the adapter as it was trained")
    model, tokenizer = load_adapted(adapter)
    rows = None
    if held_out is not None:
        limits = {"rows": held_out.rows, "max_length": held_out.max_length}
        part = "test" if held_out.name == STDLIB_DOCS else None
        rows = load_examples(tokenizer, held_out.name, held_out=part, **limits)
    reference, trained_loss = probe_logits(model), _loss(model, rows)
    del model
    outcomes = {}
    for name, folder in folders.items():
        gc.collect()
        tell(f"Measuring the merge into {name} weights")
        merged = load_model(str(folder), None).eval()
        outcomes[name] = _compare(reference, probe_logits(merged), _loss(merged, rows))
        del merged
    return trained_loss, outcomes


def _loss(model: Any, rows: Any) -> float | None:
    return None if rows is None else score(model, rows).loss


def _compare(reference: torch.Tensor, logits: torch.Tensor, loss: float | None) -> Outcome:
    first, second = log_softmax(reference.double(), -1), log_softmax(logits.double(), -1)
    return Outcome(
        largest=float((logits - reference).abs().max()),
        spread=float(reference.std()),
        divergence=float(kl_div(second, first, reduction="none", log_target=True).sum(-1).mean()),
        agreement=float((logits.argmax(-1) == reference.argmax(-1)).double().mean()),
        loss=loss,
    )
