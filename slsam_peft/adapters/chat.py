"""Gives two answers to one prompt, token by token: with an adapter and without it."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel

Message = dict[str, str]


class Answer:
    """An answer that grows by one token at a time, by one model, with or without its adapter.

    Args:
        model (`PeftModel`): In evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer. Without a chat template the last message is continued.
        messages (`list[dict]`): The conversation so far; the last message is the user's.
        adapted (`bool`): Whether the adapter takes part.
        limit (`int`): Tokens that an answer has at most.
        temperature (`float`): 0 takes the most likely token each time.
        seed (`int`): Seed of the draws, where the temperature is not 0.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        messages: list[Message],
        *,
        adapted: bool,
        limit: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._model, self._tokenizer, self._adapted = model, tokenizer, adapted
        self._limit, self._temperature = limit, temperature
        self._generator = torch.Generator().manual_seed(seed)
        self._next = _encode(tokenizer, messages).to(model.get_input_embeddings().weight.device)  # type: ignore[union-attr]
        self._ends = _ends(model, tokenizer)
        self._cache: Any = None
        self.tokens: list[int] = []
        self.done = False

    @property
    def text(self) -> str:
        """The answer so far; it ends in "..." where it was cut off."""
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        return f"{text} ..." if self.done and len(self.tokens) == self._limit else text

    @torch.inference_mode()
    def step(self) -> None:
        """Add one token, or find that the answer has ended."""
        if self.done:
            return
        with nullcontext() if self._adapted else self._model.disable_adapter():
            output = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        token = self._choose(output.logits[0, -1].float().cpu())
        if token in self._ends:
            self.done = True
            return
        self.tokens.append(token)
        self._next = torch.tensor([[token]], device=self._next.device)
        self.done = len(self.tokens) == self._limit

    def _choose(self, logits: torch.Tensor) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        shares = torch.softmax(logits / self._temperature, -1)
        return int(torch.multinomial(shares, 1, generator=self._generator))


def stream(*answers: Answer) -> Iterator[None]:
    """Let answers grow in turn, one token each, until all have ended."""
    while not all(answer.done for answer in answers):
        for answer in answers:
            answer.step()
        yield


def _encode(tokenizer: Any, messages: list[Message]) -> torch.Tensor:
    if tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    return encoded["input_ids"]


def _ends(model: PeftModel, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    ends = found if isinstance(found, list) else [found]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
