"""Makes instruction pairs from the documentation strings of the Python standard library.

Everything is read from the running interpreter, so nothing is shipped, and no network is needed. Only the modules
listed here are imported; none of them does anything on import but define names. The pairs are the same for the same
Python version, platform, seed and sizes.
"""

import importlib
import inspect
import random
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict

TRAIN_MODULES = (
    "abc", "argparse", "ast", "base64", "cmath", "codecs", "collections", "concurrent.futures", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "dis", "doctest", "email.message",
    "email.utils", "enum", "filecmp", "fnmatch", "functools", "hashlib", "html", "html.parser", "http.client",
    "http.cookies", "importlib.metadata", "inspect", "io", "itertools", "json", "logging", "logging.handlers",
    "mailbox", "math", "operator", "optparse", "os", "pathlib", "pickle", "pprint", "queue", "random", "re",
    "selectors", "shutil", "socket", "string", "struct", "subprocess", "tarfile", "tempfile", "threading", "time",
    "tokenize", "traceback", "types", "typing", "unicodedata", "unittest", "unittest.mock", "urllib.parse",
    "urllib.request", "warnings", "weakref", "xml.dom.minidom", "xml.etree.ElementTree", "zipfile",
)  # fmt: skip

HELD_OUT_MODULES = (
    "bisect", "calendar", "colorsys", "difflib", "fractions", "getpass", "glob", "heapq", "hmac", "ipaddress",
    "linecache", "mimetypes", "numbers", "os.path", "platform", "pstats", "secrets", "shlex", "statistics",
    "textwrap", "timeit", "uuid",
)  # fmt: skip


MIN_ANSWER, MAX_ANSWER = 30, 320  # characters: shorter ones say nothing, longer ones cost time on a CPU
MAX_SIGNATURE = 60  # characters


def stdlib_docs(
    *, n_train: int | None = None, n_test: int | None = None, seed: int = 0, label_noise: float = 0.0
) -> "DatasetDict":
    """Build questions on the standard library and their answers, in conversational prompt-completion form.

    Args:
        n_train (`int`, *optional*): Training pairs to draw with `seed`; all, in an order drawn with `seed`, where it
            is missing.
        n_test (`int`, *optional*): Held-out pairs; all where it is missing. The same ones for every `seed`.
        seed (`int`, defaults to `0`): Seed of the training pairs' choice, order and noise.
        label_noise (`float`, defaults to `0.0`): Share of training pairs, in [0, 1], whose answers are swapped among
            each other, so that each of them has a wrong one. Held-out pairs are never touched.

    Returns:
        `datasets.DatasetDict`: Splits `"train"` and `"test"` with columns `prompt` and `completion`. They come from
        different modules and share no answer.

    Raises:
        ValueError: more pairs are asked for than there are, or `label_noise` is outside [0, 1] or so small that it
            means one pair.
        RuntimeError: Python runs without documentation strings (`-OO`).
    """
    from datasets import Dataset, DatasetDict

    if sys.flags.optimize >= 2:
        raise RuntimeError("Python's documentation strings are missing: run without -OO (and PYTHONOPTIMIZE=2).")
    # No answer of a held-out pair is trained on.
    held_out = list(_pairs(HELD_OUT_MODULES))
    answers = {answer for _, answer in held_out}
    train = [pair for pair in _pairs(TRAIN_MODULES) if pair[1] not in answers]
    # The seed decides which pairs are trained on, and whose answers are wrong; the held-out ones never change.
    rng = random.Random(seed)
    train = rng.sample(train, _size("n_train", n_train, len(train)))
    held_out = random.Random(0).sample(held_out, _size("n_test", n_test, len(held_out)))
    train = _swap_answers(train, label_noise, rng)
    splits = {"train": train, "test": held_out}
    return DatasetDict({name: Dataset.from_list([_row(*pair) for pair in split]) for name, split in splits.items()})


def _size(what: str, asked: int | None, available: int) -> int:
    if asked is None:
        return available
    if not 1 <= asked <= available:
        raise ValueError(f"{what}={asked} is not allowed; this Python's documentation gives 1 to {available} pairs.")
    return asked


def _row(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _swap_answers(pairs: list[tuple[str, str]], share: float, rng: random.Random) -> list[tuple[str, str]]:
    """Return pairs of which a share have each other's answers."""
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise={share} is not allowed; it is a share in [0, 1].")
    count = round(share * len(pairs))
    if share > 0 and count < 2:
        raise ValueError(
            f"label_noise={share} of {len(pairs)} pairs is {count}; at least 2 answers are needed to swap."
        )
    chosen = rng.sample(range(len(pairs)), count)
    swapped = list(pairs)
    for here, there in zip(
        chosen, chosen[1:] + chosen[:1], strict=True
    ):  # one cycle, so that no question keeps its answer
        swapped[here] = (pairs[here][0], pairs[there][1])
    return swapped


def _pairs(modules: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield a (question, answer) for each documented module, class, method and function; no answer twice."""
    seen: set[str] = set()
    for name in modules:
        module = importlib.import_module(name)
        for question, documented in _documented(name, module):
            answer = _answer(documented)
            if answer is not None and answer not in seen:
                seen.add(answer)
                yield question, answer


def _documented(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield a question for a module and each of its public classes, methods and functions, with the thing itself."""
    yield f"What is Python's `{name}` module for?", module
    for attribute in sorted(_public(module)):
        thing = getattr(module, attribute)
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            if thing.__module__ == name:
                yield f"What is the class `{name}.{attribute}` in Python?", thing
                yield from _methods(f"{name}.{attribute}", thing)
        elif inspect.isroutine(thing):
            yield _question(f"{name}.{attribute}", thing), thing


def _public(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or vars(module)
    return [n for n in names if not n.startswith("_") and hasattr(module, n)]


def _methods(prefix: str, owner: type) -> Iterator[tuple[str, Any]]:
    for attribute, thing in sorted(vars(owner).items()):
        if not attribute.startswith("_") and inspect.isroutine(thing):
            yield _question(f"{prefix}.{attribute}", thing), thing


def _question(name: str, thing: Any) -> str:
    return f"What does `{name}{_signature(thing)}` do in Python?"


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):  # no signature is known for some functions written in C
        return "()"
    varies = " at 0x" in text or sys.prefix in text  # defaults that differ from run to run or machine to machine
    return "(...)" if varies or len(text) > MAX_SIGNATURE else text


def _answer(thing: Any) -> str | None:
    """Return the leading plain paragraphs of `thing`'s own documentation, or None where there is too little."""
    text = thing.__doc__
    if not isinstance(text, str):
        return None
    # The first paragraphs say what a thing does; examples and lists follow them.
    kept: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if not lines or not _is_prose(lines):
            break
        if lines[-1].endswith(":"):  # leads over to an example or a list
            break
        joined = " ".join(paragraph.split())
        if sum(map(len, kept)) + len(joined) > MAX_ANSWER:
            break
        kept.append(joined)
    answer = "\n\n".join(kept)
    return answer if len(answer) >= MIN_ANSWER else None


def _is_prose(lines: list[str]) -> bool:
    """Tell sentences from code, examples, lists and the signature lines that C functions start with."""
    is_signature = re.match(r"[\w.]+\(", lines[0]) is not None
    return lines[0][0].isupper() and not is_signature and not any(line.startswith(" ") for line in lines)
