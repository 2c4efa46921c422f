"""Pairs as tokens, and how well a model predicts the answers of held-out ones."""

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
        if prompt and answer["role"] == "assistant":
            return [dict(m) for m in prompt], answer["content"]
    elif row.get("prompt") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt, completion
        if len(completion) == 1:
            return [dict(m) for m in prompt], completion[0]["content"]
    raise UserError(f"{where}: it needs a prompt and one answer: 'prompt' and 'completion', or 'messages'.")


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
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Tokens((ids + answer_ids)[:max_length], min(len(ids), max_length))


def answered(tokenizer: Any, pairs: Sequence[Pair], max_length: int, prompt_format: str | None = None) -> list[Tokens]:
    """Return the pairs as tokens, see `tokenise`, without those whose answer is cut off whole: they teach nothing."""
    rows = (tokenize(tokenizer, pair, max_length, prompt_format) for pair in pairs)
    return [row for row in rows if row.prompt < len(row.ids)]


@torch.inference_mode()
def score(model: torch.nn.Module, rows: Sequence[Tokens]) -> Score:
    """Score the answers of `rows`, in evaluation mode. A row whose answer was cut off whole counts for nothing.

    Args:
        model (`torch.nn.Module`): A causal language model that takes `logits_to_keep`.
        rows (`Sequence[Tokens]`): Pairs.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64)
    right = exact = tokens = answers = 0
    ordered = sorted(rows, key=lambda row: len(row.ids))  # little padding
    for start in range(0, len(ordered), SCORED_BATCH):
        ids, mask, labels = (t.to(device) for t in padded(ordered[start : start + SCORED_BATCH]))
        first = max(0, int((labels != IGNORED).any(0).int().argmax()) - 1)  # no answer token before
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first, use_cache=False).logits
        targets = labels[:, first + 1 :]
        scored = targets != IGNORED
        logits = logits[:, :-1]
        loss += cross_entropy(logits[scored].float(), targets[scored], reduction="sum").double().cpu()
        hit = logits.argmax(-1) == targets
        right += int((hit & scored).sum())
        tokens += int(scored.sum())
        exact += int(((hit | ~scored).all(1) & scored.any(1)).sum())
        answers += int(scored.any(1).sum())
    model.train(training)
    return Score(float(loss) / tokens, right / tokens, exact / answers, tokens)


def padded(rows: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and labels, each of shape `(rows, longest)`."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, row.prompt : len(row.ids)] = ids[i, row.prompt : len(row.ids)]
    return ids, mask, labels
