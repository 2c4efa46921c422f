"""Usual spellings of training rows become TRL's own; what cannot be is refused."""

import copy
import inspect
from typing import Any

import pytest
from trl.data_utils import _tokenize

from slsam_peft.data.rows import RESERVED, RowError
from slsam_peft.data.spellings import Converter
from tests.tiny import tokenizer

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
FROM_VALUE = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


UNCHANGED: list[dict[str, Any]] = [
    {"text": "a", "id": 3},
    {"prompt": "a", "completion": "b", "meta": {"x": None}},
    {"messages": [SYSTEM, ASKED, ANSWERED], "id": "007"},
    {"messages": [ASKED, {**ANSWERED, "weight": 1, "name": None}]},
    {"messages": [ASKED, call({"x": 1})], "tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWERED]},
    {"prompt": [ASKED], "completion": [ANSWERED], "chat_template_kwargs": {"thinking": False}},
    {"input_ids": [1, 2], "labels": [-100, 2], "text": None},
    {"messages": [ASKED, ANSWERED], "tools": '[{"type": "function"}]'},
    {"messages": [ASKED, ANSWERED], "tools": "null"},
    {"messages": [ASKED, {**ANSWERED, "tool_calls": []}], "tools": []},
    {"messages": [ASKED, ANSWERED], "chat_template_kwargs": {"chat_template": "{{ messages }}", "documents": [{}]}},
    {"text": "a", "tools": 5, "chat_template_kwargs": {"tokenize": True}},  # no template is given these
    {"input_ids": [1, 2], "tools": "{bad"},
]


@pytest.mark.parametrize("row", UNCHANGED, ids=lambda row: ", ".join(row))
def test_rows_in_trls_own_spelling_stay_as_they_are(row: dict[str, Any]) -> None:
    convert, before = Converter(), copy.deepcopy(row)
    assert convert(row)[1] == before == row
    assert convert.sentences() == []


CONVERTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ShareGPT": ({"conversations": FROM_VALUE}, {"messages": [ASKED, ANSWERED]}),
    "ShareGPT, system column": (
        {"system": "Be brief.", "conversations": FROM_VALUE},
        {"messages": [SYSTEM, ASKED, ANSWERED]},
    ),
    "ShareGPT, empty system": ({"system": "", "conversations": FROM_VALUE}, {"messages": [ASKED, ANSWERED]}),
    "ShareGPT, system said already": (
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *FROM_VALUE]},
        {"messages": [SYSTEM, ASKED, ANSWERED]},
    ),
    "ShareGPT, tools": (
        {"conversations": [*FROM_VALUE, {"from": "observation", "value": "x"}]},
        {"messages": [ASKED, ANSWERED, {"role": "tool", "content": "x"}]},
    ),
    "conversations of roles": ({"conversations": [ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED]}),
    "conversation of roles": ({"conversation": [ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED]}),
    "messages of from": ({"messages": FROM_VALUE}, {"messages": [ASKED, ANSWERED]}),
    "messages of both, from a table": (
        {
            "messages": [
                {"from": "human", "value": "2 + 2?", "role": None, "content": None},
                {**ANSWERED, "from": None},
            ]
        },
        {"messages": [ASKED, {**ANSWERED, "from": None}]},
    ),
    "prompt of from": (
        {"prompt": FROM_VALUE[:1], "completion": FROM_VALUE[1:]},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ),
    "prompt and a system column": (
        {"prompt": [ASKED], "completion": [ANSWERED], "system_prompt": "Be brief."},
        {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
    ),
    "names of roles": (
        {"messages": [{"role": "Developer", "content": "Be brief."}, {**ASKED, "role": "Human"}, ANSWERED]},
        {"messages": [SYSTEM, ASKED, ANSWERED]},
    ),
    "a question before its conversation": (
        {"prompt": "2 + 2?", "messages": [ASKED, ANSWERED], "prompt_id": "a"},
        {"messages": [ASKED, ANSWERED], "prompt_id": "a"},
    ),
    "arguments as texts": ({"messages": [ASKED, call('{"x": 1}')]}, {"messages": [ASKED, call({"x": 1})]}),
    "no arguments, as a text": ({"messages": [ASKED, call("")]}, {"messages": [ASKED, call({})]}),
    "arguments as texts, without a function": (
        {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}]},
        {"messages": [ASKED, {**ANSWERED, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"prompt": [{"role": "user", "content": "Add.\n2, 2"}], "completion": [ANSWERED]},
    ),
    "Alpaca, no input": (
        {"instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief."},
        {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
    ),
    "Alpaca, history": (
        {"instruction": "2 + 2?", "output": "4", "history": [["a", "b"]]},
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, ASKED],
            "completion": [ANSWERED],
        },
    ),
}


@pytest.mark.parametrize(("row", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_usual_spellings_are_converted_and_said(row: dict[str, Any], expected: dict[str, Any]) -> None:
    convert, before = Converter(), copy.deepcopy(row)
    assert convert(row)[1] == expected
    assert row == before
    assert len(convert.sentences()) == 1


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "a text beside an answer": ({"prompt": "a", "completion": "b", "text": "c"}, ("prompt", "completion"), "'text'"),
    "labels beside a text": ({"text": "a", "labels": "good"}, ("text",), "'labels'"),
    "an answer beside a conversation": ({"messages": [ASKED, ANSWERED], "chosen": "a"}, ("messages",), "'chosen'"),
    "a system prompt beside texts": (
        {"system": "a", "prompt": "a", "completion": "b"},
        ("system", "prompt", "completion"),
        "'system'",
    ),
    "columns without values": ({"text": "a", "prompt": None, "messages": None}, ("text",), ""),
}


@pytest.mark.parametrize(("row", "kept", "said"), OTHERS.values(), ids=OTHERS)
def test_columns_of_other_kinds_of_rows_do_not_come_along(
    row: dict[str, Any], kept: tuple[str, ...], said: str
) -> None:
    convert = Converter()
    assert tuple(convert(row)[1]) == kept
    assert said in " ".join(convert.sentences())
    assert bool(convert.sentences()) == bool(said)


def templated(**columns: Any) -> dict[str, Any]:
    return {"messages": [ASKED, ANSWERED], **columns}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "arguments no JSON": (
        {"messages": [ASKED, call("{bad")]},
        "'messages', message 2, tool call 1 has arguments that are no JSON: expecting property name",
    ),
    "arguments with a key twice": ({"messages": [call('{"x": 1, "x": 2}')]}, "the key 'x' comes twice"),
    "arguments a list": (
        {"messages": [call("[1]")]},
        "tool call 1 has arguments that are a list; write them as an obj",
    ),
    "arguments a number": ({"messages": [call(5)]}, "tool call 1 has arguments that are a number"),
    "calls no list": (
        {"messages": [{**ANSWERED, "tool_calls": "f"}]},
        "has 'tool_calls', which must be a list of obj",
    ),
    "call no object": ({"messages": [{**ANSWERED, "tool_calls": ["f"]}]}, "a list of objects, and holds a text"),
    "tools a number": (templated(tools=5), "'tools' must be a list of objects, not a number"),
    "tools of texts": (templated(tools=["f"]), "'tools' must be a list of objects, and holds a text"),
    "tools no JSON": (templated(tools="{bad"), "'tools' is a text that is no JSON: expecting property name"),
    "tools a JSON text of none": (templated(tools='"f"'), "'tools' must be a list of objects, not a text"),
    "options no object": (templated(chat_template_kwargs=5), "'chat_template_kwargs' must be an object, not a number"),
    "options with tools": (
        templated(chat_template_kwargs={"tools": 5}),
        "has 'tools', which must be a list of objects",
    ),
    "options with documents": (templated(chat_template_kwargs={"documents": "a"}), "has 'documents', which must be"),
    "options with a template": (
        templated(chat_template_kwargs={"chat_template": 5}),
        "which must be a text, not a num",
    ),
    **{
        f"options with {name}": (
            templated(chat_template_kwargs={"thinking": True, name: None}),
            f"'chat_template_kwargs' has '{name}', which training says itself",
        )
        for name in ("self", "messages", "conversation", "tokenize", "return_dict", "add_generation_prompt", "padding")
    },
    "unknown role": ({"conversations": [{"from": "narrator", "value": "a"}]}, "message 1 has the role 'narrator'"),
    "no value": ({"conversations": [{"from": "human"}]}, "needs a 'content'"),
    "value no text": ({"conversations": [{"from": "human", "value": 4}]}, "not a number"),
    "two spellings at once": ({"messages": [{**ASKED, "from": "human"}]}, "has both 'from' and 'role'; leave one out"),
    "two system prompts": ({"system": "Be long.", "messages": [SYSTEM, ASKED]}, "are two different system prompts"),
    "system no text": ({"system": 3, "messages": [ASKED]}, "'system' must be a text, not a number"),
    "conversations no list": ({"conversations": "a"}, "'conversations' must be a list of one or more messages"),
    "message no object": ({"conversations": [ASKED, "a"]}, "'conversations', message 2 must be an object, not a text"),
    "Alpaca without answers": ({"instruction": "a", "output": None}, "the columns are 'instruction', 'output'"),
    "Alpaca of numbers": ({"instruction": "a", "output": 4}, "'output' must be a text, not a number"),
    "history of texts": ({"instruction": "a", "output": "b", "history": ["a"]}, "'history' must be a list of pairs"),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as caught:
        Converter()(row)
    assert said in str(caught.value)


def test_every_argument_that_the_trainer_says_itself_is_reserved() -> None:
    """What TRL passes on, by its own code, would come twice; so would the names of the functions' parameters."""
    asked = {"conversation", "add_generation_prompt", "tokenize", "return_dict", "return_assistant_tokens_mask"}
    assert asked <= {*RESERVED}
    assert {*inspect.signature(_tokenize).parameters} - {"apply_chat_template_kwargs"} <= {*RESERVED}
    for name in asked - {"conversation"}:
        assert name in inspect.signature(tokenizer().apply_chat_template).parameters
