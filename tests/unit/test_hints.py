"""Which name is offered for one that is not known, wherever names are asked for."""

import pytest

from slsam_peft.names import hint_at

FLAGS = ("--rho", "--learning_rate", "--max_steps", "--active_fraction", "--cost_budget")


@pytest.mark.parametrize(
    ("given", "known", "offered"),
    [
        ("roh", ("rho", "seed"), "rho"),
        ("deep", ("bernoulli", "window", "depth"), "depth"),
        ("nf5", ("fp4", "nf4"), "nf4"),
        ("Bernouli", ("bernoulli", "depth"), "bernoulli"),
        ("--lernin_rate", FLAGS, "--learning_rate"),
        ("--cost_bugdet", FLAGS, "--cost_budget"),
        ("smolm2", ("smollm2",), "smollm2"),
        ("llama3.1-8B", ("llama-3.1-8b", "qwen3-8b"), "llama-3.1-8b"),
        ("txt", ("prompt", "completion", "messages", "text"), "text"),
    ],
)
def test_a_misspelling_is_answered_with_the_name(given: str, known: tuple[str, ...], offered: str) -> None:
    assert hint_at(given, known) == f" Did you mean '{offered}'?"


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("--lr", FLAGS),  # the dashes are no likeness
        ("gpt2", ("smollm2",)),
        ("input", ("prompt", "completion", "messages", "text")),
        (3, ("3",)),
        ("", FLAGS),
    ],
)
def test_names_that_have_little_in_common_are_not_offered(given: object, known: tuple[str, ...]) -> None:
    assert hint_at(given, known) == ""
