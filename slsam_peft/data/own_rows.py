"""Reads somebody's own rows as pairs of question and answer, and holds a part of them out by a hash.

The rows are those that `slsam-peft sft` takes, and are trained on as it trains on them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from slsam_peft.data.held_out import load_eval_split
from slsam_peft.data.load import load_split
from slsam_peft.data.parts import as_texts
from slsam_peft.data.rows import TEMPLATE_OPTIONS, RowError
from slsam_peft.data.scoring import Pair, pair_of
from slsam_peft.errors import UserError

# Fewer rows than these tell nothing: a held-out loss that a single row decides, or a training of a few steps.
LEAST_TRAIN, LEAST_VALIDATION, LEAST_TEST = 24, 8, 16
# More held-out rows than these are left to training, or are not scored, which would take longer than training does.
MOST_VALIDATION, MOST_TEST = 128, 256

_UNKNOWN = ("tools", TEMPLATE_OPTIONS)  # columns that a chat template would have to be given


@dataclass(frozen=True)
class OwnRows:
    """Rows of one's own.

    Args:
        pairs (`list[Pair]`): Question and answer of each; a plain text is the answer to an empty question, and of a
            conversation the last message is the answer.
        whole (`bool`): Training counts every token of a row, the question's too, as `sft` does with conversations
            under `messages` and with texts; otherwise the answer's alone.
    """

    pairs: list[Pair]
    whole: bool


@dataclass(frozen=True)
class OwnSplit:
    """Rows of one's own, split.

    Args:
        train, validation, test (`list[Pair]`): No two of them share a question.
        whole (`bool`): See `OwnRows`.
        shared (`int`): Rows of a held-out file that are left out since their questions are trained on.
        digest (`str`): Hash of all of it.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    whole: bool
    shared: int
    digest: str


def read_own(name: str, held_out: str | None = None) -> OwnRows:
    """Read rows of one's own.

    Args:
        name (`str`): A file, a folder, a name on the Hub or `"stdlib_docs"`, see `slsam_peft.data.load`.
        held_out (`str`, *optional*): A held-out file, or the split of `name` to read instead of `"train"`.

    Raises:
        UserError: they cannot be read, a row has no answer that could be scored or an empty one, or some rows have
            a prompt and others none. The message names file and line or row.
    """
    data = load_split(name) if held_out is None else load_eval_split(name, held_out)
    where = held_out or name
    pairs, whole = [], None
    for number, read in enumerate(data, 1):
        row = dict(read)
        pairs.append(_pair(row, f"{where}, row {number}"))
        counts_all = row.get("prompt") is None
        if whole not in (None, counts_all):
            raise UserError(
                f"{where}, row {number} has {'no prompt, and' if counts_all else 'a prompt, and not'} the rows before "
                f"it{' have' if counts_all else ''}: training counts the tokens of answers alone where there is a "
                "prompt, and all tokens where there is none. Write all rows in one way."
            )
        whole = counts_all
    return OwnRows(pairs, bool(whole))


def _pair(row: dict[str, Any], where: str) -> Pair:
    for name in _UNKNOWN:
        if row.get(name) and row[name] != "{}":
            raise UserError(f"{where} has {name!r}, which a comparison cannot take; leave the column out.")
    if row.get("messages") is None and row.get("prompt") is None and isinstance(row.get("text"), str):
        if not row["text"]:
            raise UserError(f"{where}: the text is empty, and there is nothing to predict; leave the row out.")
        return "", row["text"]
    try:
        return pair_of(as_texts(row), where)
    except RowError as error:
        raise UserError(f"{where}: {error.sentence}") from None


def split_own(name: str, held_out: str | None = None) -> OwnSplit:
    """Read rows of one's own and split them, by a hash of each question and by nothing else.

    Without held-out data a fifth of the rows is for the test and a tenth for validation, at least 16 and 8. With them,
    a third of those is for validation and the rest for the test. At most 128 and 256 are taken.

    Args:
        name (`str`): As of `read_own`.
        held_out (`str`, *optional*): As of `read_own`.

    Raises:
        UserError: see `read_own`; or there are too few rows. The message says how many are needed.
    """
    return _split(name, held_out, _stamp(name), _stamp(held_out))


def _stamp(name: str | None) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file does, or one below a folder; empty where the name is that of neither."""
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return ()
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=2)  # each run of a comparison asks for the same rows
def _split(name: str, held_out: str | None, *stamps: tuple[tuple[str, int, int], ...]) -> OwnSplit:
    rows = read_own(name)
    if held_out is None:
        asked = _part(len(rows.pairs), 5, LEAST_TEST, MOST_TEST), _part(len(rows.pairs), 10, LEAST_VALIDATION)
        test, validation, train = hold_out(rows.pairs, *asked)
        shared = 0
    else:
        train, known = rows.pairs, {question_of(pair) for pair in rows.pairs}
        read = read_own(name, held_out).pairs
        others = [pair for pair in read if question_of(pair) not in known]
        shared = len(read) - len(others)
        asked = _part(len(others), 3, LEAST_VALIDATION)
        validation, test, _ = hold_out(others, asked, min(MOST_TEST, max(0, len(others) - asked)))
    _check_counts(name, held_out, len(train), len(validation), len(test), shared)
    text = json.dumps([train, validation, test, rows.whole])
    return OwnSplit(train, validation, test, rows.whole, shared, hashlib.sha256(text.encode()).hexdigest()[:16])


def _part(rows: int, parts: int, least: int, most: int = MOST_VALIDATION) -> int:
    return min(most, max(least, rows // parts))


def question_of(pair: Pair) -> str:
    """Return what tells a row from others: its question, or the text where there is none; case and space aside."""
    question, answer = pair
    text = (
        question if isinstance(question, str) else "\n".join(str(message.get("content") or "") for message in question)
    )
    return " ".join((text or answer).casefold().split())


def hold_out(pairs: Sequence[Pair], first: int, second: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Split pairs into two held-out parts and the rest, which keeps its order.

    Pairs that share a question go to the same part. Parts are filled in the order of a hash of the questions; a
    question that comes more often than there is room for stays with the rest.

    Args:
        pairs (`Sequence[Pair]`): All of them.
        first (`int`): Most pairs of the first held-out part.
        second (`int`): Most pairs of the second one.
    """
    by_question: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_question.setdefault(question_of(pair), []).append(pair)
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    taken = set()
    for question in sorted(by_question, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        for part, most in zip(parts, (first, second), strict=True):
            if len(part) + len(by_question[question]) <= most:
                part += by_question[question]
                taken.add(question)
                break
    return *parts, [pair for pair in pairs if question_of(pair) not in taken]


def _check_counts(name: str, held_out: str | None, train: int, validation: int, test: int, shared: int) -> None:
    held = LEAST_VALIDATION + LEAST_TEST
    what = f"{LEAST_VALIDATION} to choose learning rates by and {LEAST_TEST} to test on"
    if held_out is None and (train < LEAST_TRAIN or validation < LEAST_VALIDATION or test < LEAST_TEST):
        raise UserError(
            f"{name}: {_too_few(train + validation + test)}. A comparison needs {LEAST_TRAIN + held} with "
            f"different questions: {LEAST_TRAIN} to train on, {what}. Add rows, or name "
            "held-out ones: --eval_data FILE."
        )
    if train < LEAST_TRAIN:
        raise UserError(f"{name}: {_too_few(train)}; a comparison needs {LEAST_TRAIN} to train on. Add rows.")
    if validation < LEAST_VALIDATION or test < LEAST_TEST:
        without = f", without {shared} whose questions are in {name} too" if shared else ""
        raise UserError(
            f"{held_out}: {_too_few(validation + test)}{without}. A comparison needs {held} with different "
            f"questions: {what}. Add rows, or leave --eval_data out: a part of {name} is held out then."
        )


def _too_few(rows: int) -> str:
    return "1 row is too few" if rows == 1 else f"{rows} rows are too few"
