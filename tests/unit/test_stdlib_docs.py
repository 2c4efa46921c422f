"""Instruction pairs from the standard library's documentation."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slsam_peft.data import stdlib_docs as module
from slsam_peft.data.stdlib_docs import HELD_OUT_MODULES, TRAIN_MODULES, stdlib_docs

Pair = tuple[str, str]


def pairs(rows) -> list[Pair]:
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


@pytest.fixture(scope="module")
def everything() -> tuple[list[Pair], list[Pair]]:
    data = stdlib_docs()
    return pairs(data["train"]), pairs(data["test"])


def test_there_are_enough(everything: tuple[list[Pair], list[Pair]]) -> None:
    train, test = everything
    assert len(train) >= 1000
    assert len(test) >= 150


def test_splits_are_disjoint(everything: tuple[list[Pair], list[Pair]]) -> None:
    train, test = everything
    assert not set(TRAIN_MODULES) & set(HELD_OUT_MODULES)
    for of_train, of_test in zip(zip(*train, strict=True), zip(*test, strict=True), strict=True):
        assert not set(of_train) & set(of_test)
    # A question names its module, and the longest matching module name decides.
    modules = sorted(TRAIN_MODULES + HELD_OUT_MODULES, key=len, reverse=True)
    for questions, allowed in ((train, TRAIN_MODULES), (test, HELD_OUT_MODULES)):
        for question, _ in questions:
            name = question.split("`")[1]
            assert next(m for m in modules if name == m or name.startswith(m + ".")) in allowed


def test_no_question_and_no_answer_comes_twice(everything: tuple[list[Pair], list[Pair]]) -> None:
    for split in everything:
        for column in zip(*split, strict=True):
            assert Counter(column).most_common(1)[0][1] == 1


def test_answers_are_the_documentation_itself(everything: tuple[list[Pair], list[Pair]]) -> None:
    _, test = everything
    answers = dict(test)
    assert answers["What does `textwrap.indent(text, prefix, predicate=None)` do in Python?"].startswith(
        "Adds 'prefix' to the beginning of selected lines in 'text'."
    )
    assert all(module.MIN_ANSWER <= len(answer) <= module.MAX_ANSWER + 10 for answer in answers.values())


def test_nothing_depends_on_the_machine(everything: tuple[list[Pair], list[Pair]]) -> None:
    for split in everything:
        for question, answer in split:
            for text in (question, answer):
                assert " at 0x" not in text
                assert sys.prefix not in text
                assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_two_processes_with_other_hash_seeds_agree() -> None:
    code = (
        "import json; from slsam_peft.data.stdlib_docs import stdlib_docs; "
        "d = stdlib_docs(n_train=50, n_test=20, seed=3, label_noise=0.5); "
        "print(json.dumps([d['train'][:], d['test'][:]]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])[0]["prompt"]) == 50


def test_seed_changes_training_pairs_only() -> None:
    first, second = (stdlib_docs(n_train=40, n_test=16, seed=seed) for seed in (0, 1))
    assert pairs(first["test"]) == pairs(second["test"])
    assert set(pairs(first["train"])) != set(pairs(second["train"]))
    assert pairs(first["train"]) == pairs(stdlib_docs(n_train=40, n_test=16, seed=0)["train"])


@pytest.mark.parametrize(("n", "share", "expected"), [(96, 0.25, 24), (96, 1.0, 96), (10, 0.2, 2), (7, 0.0, 0)])
def test_noise_swaps_the_stated_share_among_each_other(n: int, share: float, expected: int) -> None:
    clean = stdlib_docs(n_train=n, n_test=8, seed=5)
    swapped = stdlib_docs(n_train=n, n_test=8, seed=5, label_noise=share)
    before, after = pairs(clean["train"]), pairs(swapped["train"])
    assert [q for q, _ in before] == [q for q, _ in after]
    assert sum(x[1] != y[1] for x, y in zip(before, after, strict=True)) == expected
    assert Counter(a for _, a in before) == Counter(a for _, a in after)
    assert pairs(clean["test"]) == pairs(swapped["test"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": 0}, "n_train=0 is not allowed"),
        ({"n_train": 10**6}, "n_train=1000000 is not allowed; this Python's documentation gives 1 to "),
        ({"n_test": -1}, "n_test=-1 is not allowed"),
        ({"label_noise": 1.5}, r"label_noise=1.5 is not allowed; it is a share in \[0, 1\]"),
        ({"label_noise": float("nan")}, "label_noise=nan is not allowed"),
        ({"n_train": 4, "label_noise": 0.25}, "at least 2 answers are needed to swap"),
    ],
)
def test_bad_values(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stdlib_docs(**arguments)


def test_stripped_documentation_is_an_error() -> None:
    code = "from slsam_peft.data.stdlib_docs import stdlib_docs; stdlib_docs()"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-OO", "-c", code], env=environment, capture_output=True, text=True)
    assert "RuntimeError: Python's documentation strings are missing" in done.stderr
