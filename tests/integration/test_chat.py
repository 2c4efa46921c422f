"""`slsam-peft chat`: both answers are those that generation gives, and it ends cleanly."""

import builtins

import pytest
import torch

from slsam_peft.adapters.chat import Answer, stream
from slsam_peft.cli import chat
from slsam_peft.cli.main import main
from tests.handed import adapted, save_adapter
from tests.tiny import llama, lora, tokenizer

LLM = {"task_type": "CAUSAL_LM"}
PROMPT = "w3 w5 w8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_adapter(folder / "adapter", folder / "base", lora(**LLM))
    return folder


@pytest.fixture(scope="module")
def model():
    return adapted(llama(), lora(**LLM), scale=0.3)


def both(model, prompt=PROMPT, **settings):
    settings = {"limit": 9, "temperature": 0.0, "seed": 0, **settings}
    messages = [{"role": "user", "content": prompt}]
    answers = [Answer(model, tokenizer(), messages, adapted=adapted, **settings) for adapted in (True, False)]
    for _ in stream(*answers):
        pass
    return answers


def test_answers_are_those_of_generate(model):
    encoder = tokenizer()
    inputs = encoder.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def generate():
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        return [t for t in output[0, inputs["input_ids"].shape[1] :].tolist() if t != encoder.eos_token_id]

    answers = both(model)
    assert answers[0].tokens == generate()
    with model.disable_adapter():
        assert answers[1].tokens == generate()
    assert answers[0].tokens != answers[1].tokens
    assert not any(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))


def test_an_answer_ends_at_the_end_token_or_at_the_limit(model):
    first = both(model)[0]
    assert len(first.tokens) == 9
    assert first.text.endswith(" ...")
    end = first.tokens[4]
    model.generation_config.eos_token_id = [2, end]
    try:
        ended = both(model)[0]
    finally:
        model.generation_config.eos_token_id = 2
    assert ended.tokens == first.tokens[: first.tokens.index(end)]
    assert not ended.text.endswith(" ...")


def test_a_seed_gives_the_same_draws(model):
    drawn = [both(model, temperature=5.0, seed=seed)[0].tokens for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_prompt(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["chat", str(folder / "adapter"), "--prompt", PROMPT, "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "with the adapter" in shown
    assert "without" in shown
    assert shown.count("...") == 2  # both were cut off


def typed(monkeypatch, *lines):
    """Let `lines` be typed; an exception is raised where it stands, and the input ends after them."""
    waiting = [*lines, EOFError()]

    def read(prompt=""):
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_a_conversation(folder, capsys, monkeypatch):
    seen = []

    class Spy(Answer):
        def __init__(self, model, tokenizer, messages, **settings):
            seen.append([m["role"] for m in messages])
            super().__init__(model, tokenizer, messages, **settings)

    monkeypatch.setattr("slsam_peft.adapters.chat.Answer", Spy)
    typed(monkeypatch, "w1", "", "w2", "/new", "w3")
    assert main(["chat", str(folder / "adapter"), "--max_new_tokens", "2"]) == 0
    assert seen == [["user"], ["user"], *[["user", "assistant", "user"]] * 2, ["user"], ["user"]]
    assert "Traceback" not in capsys.readouterr().err


def test_interrupts_end_an_answer_then_the_command(folder, capsys, monkeypatch):
    def interrupted(*answers):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("slsam_peft.adapters.chat.stream", interrupted)
    typed(monkeypatch, "w1", KeyboardInterrupt())
    assert main(["chat", str(folder / "adapter")]) == 0
    shown = capsys.readouterr()
    assert "Stopped." in shown.out
    assert "Traceback" not in shown.err
    assert main(["chat", str(folder / "adapter"), "--prompt", "w1"]) == 130


BAD = {
    "tokens": (["--max_new_tokens", "0"], "--max_new_tokens=0 is not allowed"),
    "temperature": (["--temperature", "-1"], "--temperature=-1.0 is not allowed"),
    "seed": (["--seed", "-1"], "--seed=-1 is not allowed"),
    "prompt": (["--prompt", " "], "--prompt is empty"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_input(arguments, expected, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "_Talk", lambda *args: pytest.fail("went on"))
    assert main(["chat", str(folder / "adapter"), *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
