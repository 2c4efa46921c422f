"""A sequence begins with the token that the model's tokenizer begins sequences with, once, whatever its prompt is."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from slsam_peft.data import passages
from slsam_peft.data.scoring import Pair, answered, begun, tokenize
from tests.tiny import tokenizer

ASKED: Pair = ([{"role": "user", "content": "w1 w2"}], "w3")
WRITTEN: Pair = ("w1 w2", "w3")


def beginning(chat_template: str | None = None) -> Any:
    """A tokenizer that begins every sequence with <bos>."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    single = [("<bos>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=single)
    made.chat_template = chat_template
    return made


def pieces(made: Any, pair: Pair, prompt_format: str | None = None) -> tuple[list[str], list[str]]:
    """What is asked and what is learnt."""
    (row,) = answered(made, [pair], 64, prompt_format)
    tokens = made.convert_ids_to_tokens(row.ids)
    return tokens[: row.prompt], tokens[row.prompt :]


@pytest.mark.parametrize(
    ("pair", "prompt_format", "asked"),
    [
        (WRITTEN, None, "<bos> w1 w2"),
        (("<bos> w1 w2", "w3"), None, "<bos> w1 w2"),
        (ASKED, "w7 {} w8", "<bos> w7 w1 w2 w8"),
        (ASKED, "<bos> {} w8", "<bos> w1 w2 w8"),
    ],
)
def test_it_begins_once_and_the_end_is_learnt(pair: Pair, prompt_format: str | None, asked: str) -> None:
    assert pieces(beginning(), pair, prompt_format) == (asked.split(), ["w3", "<eos>"])


@pytest.mark.parametrize(("pair", "prompt_format"), [(WRITTEN, None), (ASKED, "{}"), (ASKED, "<bos> {}")])
def test_an_end_that_the_tokenizer_adds_does_not_part_question_and_answer(
    pair: Pair, prompt_format: str | None
) -> None:
    made = beginning()
    special = [("<bos>", made.bos_token_id), (made.eos_token, made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<bos> $A {made.eos_token}", special_tokens=special
    )
    assert pieces(made, pair, prompt_format)[0] == ["<bos>", "w1", "w2"]


def test_a_chat_template_writes_its_own_beginning() -> None:
    made = beginning("<bos> {{ messages[0]['content'] }} <assistant>")
    assert pieces(made, ASKED) == (["<bos>", "w1", "w2", "<assistant>"], ["w3", "<eos>"])


def test_where_the_tokenizer_adds_nothing_nothing_is_added() -> None:
    made = tokenizer()
    assert made.bos_token is None
    for pair, prompt_format in ((WRITTEN, None), (ASKED, "{}")):
        assert pieces(made, pair, prompt_format) == (["w1", "w2"], ["w3", "<eos>"])
    made.add_special_tokens({"bos_token": "<user>"})  # known, and never added: so it is with SmolLM2
    assert begun(made, "w1") == tokenizer()("w1", add_special_tokens=False)["input_ids"]
    assert begun(made, "<user> w1") == tokenizer()("<user> w1", add_special_tokens=False)["input_ids"]


def test_a_prompt_as_long_as_allowed_keeps_its_beginning() -> None:
    made = beginning()
    row = tokenize(made, ASKED, 2, "{}")
    assert made.convert_ids_to_tokens(row.ids) == ["<bos>", "w1"]
    assert row.prompt == 2


def test_passages_begin_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"query": " ".join(["w5"] * count)} for count in (40, 47, 48, 60)]
    monkeypatch.setattr(passages, "read_requests", lambda _: documents)
    made = beginning()
    rows = passages.passages(made)
    assert [(made.convert_ids_to_tokens(row.ids), row.prompt) for row in rows] == [(["<bos>", *["w5"] * 47], 1)] * 3
    assert [row.ids for row in passages.passages(tokenizer())] == [tokenizer()(["w5 " * 48])["input_ids"][0]] * 2
