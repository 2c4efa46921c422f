"""Turns pairs of question and answer into tokens, and scores how well a model predicts held-out answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from slsam_peft.errors import UserError

Message = dict[str, str]
Pair = tuple[str | list[Message], str]  # what is asked, as a text or a conversation, and the answer

IGNORED = -100
SCORED_BATCH = 8


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
    """

    loss: float
    accuracy: float
    exact: float
    tokens: int


def pair_of(row: dict[str, Any], where: str) -> Pair:
    """Return a row's question and answer.

    Args:
        row (`dict`): A row with a prompt and its completion, or messages of which the assistant's is the last.
        where (`str`): File and row, for the message.

    Raises:
        UserError: it has no question, or not one answer.
    """
    if row.get("messages"):
        *prompt, answer = row["messages"]
        if prompt and answer["role"] == "assistant" and (text := _text_of(answer)):
            return [dict(m) for m in prompt], text
    elif row.get("prompt") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt, completion
        if len(completion) == 1 and (text := _text_of(completion[0])):
            return [dict(m) for m in prompt], text
    raise UserError(f"{where}: it needs a prompt and one answer, a text: 'prompt' and 'completion', or 'messages'.")


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
        text = prompt
    elif prompt_format is not None and len(prompt) == 1:
        text = prompt_format.replace("{}", prompt[0]["content"])
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + end
    return Tokens((ids + answer_ids)[:max_length], min(len(ids), max_length))


def answered(tokenizer: Any, pairs: Sequence[Pair], max_length: int, prompt_format: str | None = None) -> list[Tokens]:
    """Return the pairs as `tokenize` makes them, without those of which no answer is left."""
    sequences = (tokenize(tokenizer, pair, max_length, prompt_format) for pair in pairs)
    return [sequence for sequence in sequences if sequence.prompt < len(sequence.ids)]


@torch.inference_mode()
def score(model: torch.nn.Module, sequences: Sequence[Tokens]) -> Score:
    """Score the answers of sequences, in evaluation mode. One whose answer was cut off entirely counts for nothing.

    Args:
        model (`torch.nn.Module`): A causal language model that takes `logits_to_keep`.
        sequences (`Sequence[Tokens]`): Pairs.
    """
    training = model.training
    model.eval()
    loss, hits, tokens, exact, answers = 0.0, 0, 0, 0, 0
    ordered = sorted(sequences, key=lambda sequence: len(sequence.ids))  # batches of like lengths need little padding
    for start in range(0, len(ordered), SCORED_BATCH):
        batch_loss, hit, scored = _predictions(model, ordered[start : start + SCORED_BATCH])
        loss += batch_loss
        hits += int((hit & scored).sum())
        tokens += int(scored.sum())
        exact += int(((hit | ~scored).all(1) & scored.any(1)).sum())
        answers += int(scored.any(1).sum())
    model.train(training)
    return Score(loss / tokens, hits / tokens, exact / answers, tokens)


def _predictions(model: torch.nn.Module, batch: Sequence[Tokens]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return the summed loss of a batch's answers, where the likeliest token is right, and where one is scored."""
    device = next(model.parameters()).device
    ids, mask, labels = (t.to(device) for t in padded(batch))
    first = max(0, int((labels != IGNORED).any(0).int().argmax()) - 1)  # logits before any answer are not computed
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False).logits
    logits, targets = logits[:, :-1], labels[:, first + 1 :]
    scored = targets != IGNORED
    loss = cross_entropy(logits[scored].float(), targets[scored], reduction="sum").double().cpu()
    return float(loss), logits.argmax(-1) == targets, scored


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
