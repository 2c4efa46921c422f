"""Turns pairs of question and answer into tokens, and scores how well a model predicts held-out answers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import cross_entropy

from slsam_peft.errors import UserError

Item = TypeVar("Item")
Message = dict[str, str]
Pair = tuple[str | list[Message], str]  # what is asked, as a text or a conversation, and the answer

IGNORED = -100
SCORED_BATCH = 8
BINS = 10  # of confidence, for the calibration error


@dataclass(frozen=True)
class Tokens:
    """One pair: token ids, of which the first `prompt` belong to the question."""

    ids: list[int]
    prompt: int

    def columns(self) -> dict[str, list[int]]:
        """Return the pair as a row that `SFTTrainer` takes without preparing it."""
        mask = [0] * self.prompt + [1] * (len(self.ids) - self.prompt)
        return {"input_ids": self.ids, "completion_mask": mask}


@dataclass(frozen=True)
class Score:
    """Scores of the answers of held-out pairs.

    Args:
        loss (`float`): Mean negative log-likelihood of an answer token, in nats.
        accuracy (`float`): Share of answer tokens that are the most likely one.
        exact (`float`): Share of answers of which every token is: those that greedy decoding gives word for word.
        tokens (`int`): Answer tokens scored.
        calibration_error (`float`): Expected calibration error of whole answers (Guo et al., ICML 2017): answers in
            10 bins by the probability of their most likely tokens, and the mean distance of a bin's mean probability
            from its share of exact answers.
        losses_at (`tuple[float, ...]`): `loss` with logits divided by each of the temperatures asked for.
    """

    loss: float
    accuracy: float
    exact: float
    tokens: int
    calibration_error: float
    losses_at: tuple[float, ...] = ()


def pair_of(row: dict[str, Any], where: str) -> Pair:
    """Return a row's question and answer.

    Args:
        row (`dict`): A row with a prompt and its completion, or messages of which the assistant's is the last.
        where (`str`): File and row, for the message.

    Raises:
        UserError: it has no question, or not one answer, or that is empty.
    """
    if row.get("messages"):
        *prompt, answer = row["messages"]
        if prompt and answer["role"] == "assistant" and (text := _text_of(answer)):
            return [dict(m) for m in prompt], text
    elif row.get("prompt") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and completion:
            return prompt, completion
        if not isinstance(prompt, str) and len(completion) == 1 and (text := _text_of(completion[0])):
            return [dict(m) for m in prompt], text
    raise UserError(
        f"{where}: it needs a prompt and one answer, a text that is not empty: 'prompt' and 'completion', or "
        "'messages'."
    )


def _text_of(message: dict[str, Any]) -> str:
    """Return a message's text, its parts joined by newlines; an empty one where it has none, or anything else."""
    content = message.get("content")
    if not isinstance(content, list):
        return content or ""
    texts = [part.get("text") for part in content]
    return "" if None in texts else "\n".join(map(str, texts))


def tokenize(tokenizer: Any, pair: Pair, max_length: int, prompt_format: str | None = None) -> Tokens:
    """Turn a pair into tokens: the conversation in its template, the answer, the end of the sequence.

    Args:
        tokenizer: The model's tokenizer.
        pair (`Pair`): Question and answer.
        max_length (`int`): Tokens are cut after so many.
        prompt_format (`str`, *optional*): What stands in place of the chat template, see `TrainingSettings`.
    """
    prompt, answer = pair
    if isinstance(prompt, str):
        ids = begun(tokenizer, prompt)
    elif prompt_format is not None and len(prompt) == 1:
        ids = begun(tokenizer, prompt_format.replace("{}", prompt[0]["content"]))
    else:  # a template writes the token that a sequence begins with itself
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + end
    return Tokens((ids + answer_ids)[:max_length], min(len(ids), max_length))


def begun(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a sequence's beginning, once with the token that the tokenizer begins sequences with.

    Some models, Gemma 3 for one, predict badly without it: every sequence that they have seen began so. The token that
    the tokenizer may end sequences with is left out: more follows.
    """
    written = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not written)["input_ids"]
    ended = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended else ids


def answered(tokenizer: Any, pairs: Sequence[Pair], max_length: int, prompt_format: str | None = None) -> list[Tokens]:
    """Return the pairs as `tokenize` makes them, without those of which no answer is left."""
    sequences = (tokenize(tokenizer, pair, max_length, prompt_format) for pair in pairs)
    return [sequence for sequence in sequences if sequence.prompt < len(sequence.ids)]


@torch.inference_mode()
def score(model: torch.nn.Module, sequences: Sequence[Tokens], temperatures: Sequence[float] = ()) -> Score:
    """Score the answers of sequences, in evaluation mode. One whose answer was cut off entirely counts for nothing.

    Args:
        model (`torch.nn.Module`): A causal language model that takes `logits_to_keep`.
        sequences (`Sequence[Tokens]`): Pairs.
        temperatures (`Sequence[float]`, *optional*): Further ones than 1 that the loss is asked for at.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))  # batches of like lengths need little padding
    parts = [
        _predictions(model, ordered[start : start + SCORED_BATCH], (1.0, *temperatures))
        for start in _evaluating(model, range(0, len(ordered), SCORED_BATCH))
    ]
    tokens = sum(part.tokens for part in parts)
    right, confidence = torch.cat([part.right for part in parts]), torch.cat([part.confidence for part in parts])
    loss, *losses_at = (torch.stack([part.losses for part in parts]).sum(0) / tokens).tolist()
    return Score(
        loss,
        sum(part.hits for part in parts) / tokens,
        float(right.double().mean()),
        tokens,
        calibration_error(confidence, right),
        tuple(losses_at),
    )


@torch.inference_mode()
def row_losses(model: torch.nn.Module, sequences: Sequence[Tokens]) -> list[float]:
    """Return the mean loss of the answer tokens of each sequence, in evaluation mode and in the order given."""
    return [
        float(_predictions(model, [row], (1.0,)).losses) / (len(row.ids) - row.prompt)
        for row in _evaluating(model, sequences)
    ]


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Return the expected calibration error, see `Score`.

    Args:
        confidence (`torch.Tensor`): Probabilities in [0, 1], of shape `(answers,)`.
        right (`torch.Tensor`): Whether each answer is right, of the same shape.
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, bins, confidence.double() - right.double())
    return float(gaps.abs().sum()) / len(confidence)


def _evaluating(model: torch.nn.Module, items: Iterable[Item]) -> Iterator[Item]:
    """Yield items while a model is in evaluation mode, and put it back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield from items
    finally:
        model.train(training)


class _Part(NamedTuple):
    """What one batch adds to a score: losses by temperature, and each answer's probability and whether it is right."""

    losses: torch.Tensor
    hits: int
    tokens: int
    confidence: torch.Tensor
    right: torch.Tensor


def _predictions(model: torch.nn.Module, batch: Sequence[Tokens], temperatures: Sequence[float]) -> _Part:
    device = next(model.parameters()).device
    ids, mask, labels = (t.to(device) for t in padded(batch))
    first = max(0, int((labels != IGNORED).any(0).int().argmax()) - 1)  # logits before any answer are not computed
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False).logits
    targets = labels[:, first + 1 :]
    scored = targets != IGNORED
    counted = logits[:, :-1][scored].float()  # (answer tokens, vocabulary)
    losses = [cross_entropy(counted / at, targets[scored], reduction="sum").double().cpu() for at in temperatures]
    # Which row each answer token is of; an answer's probability is the product over its tokens.
    of, answers = scored.nonzero()[:, 0], scored.any(1)
    hit = counted.argmax(-1) == targets[scored]
    surest = counted.log_softmax(-1).amax(-1).double()
    confidence = torch.zeros(len(ids), dtype=torch.float64, device=device).index_add_(0, of, surest).exp()
    missed = torch.zeros(len(ids), device=device).index_add_(0, of, (~hit).float())
    return _Part(
        torch.stack(losses), int(hit.sum()), int(scored.sum()), confidence[answers].cpu(), (missed == 0)[answers].cpu()
    )


def padded(sequences: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and labels, each of shape `(sequences, longest)`."""
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[i, :length] = torch.tensor(sequence.ids)
        mask[i, :length] = 1
        labels[i, sequence.prompt : length] = ids[i, sequence.prompt : length]
    return ids, mask, labels
