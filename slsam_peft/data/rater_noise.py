"""Real label noise: the sentiment of short texts as one person rated it, tested against the mean of all raters.

The texts are from VADER (C.J. Hutto and E. Gilbert, ICWSM 2014; MIT license), in the package `vaderSentiment==0.5`:
tweets, sentences of Amazon product reviews, of film reviews and of New York Times editorials. At least 15 people
rated each from -4 to 4, where 0 stands for "neutral (or neither)". The third parties' texts themselves (Twitter,
Amazon, Rotten Tomatoes, The New York Times) are under the terms of their sources.

- A *training* answer is the sign of one rater's score. Which rater: drawn for each text with the seed.
- A *held-out* answer is the sign of the mean of all raters, rounded to the scale they had: between -0.5 and 0.5 it is
  "neutral". A mean is hardly ever exactly 0 (4 tweets of 4200), so without rounding no held-out answer would be
  "neutral", and every rater who says so would be wrong by construction. With it the three answers are about as
  frequent among means as among single raters ("neutral": tweets 18 % and 21 %, Amazon 19 % and 19 %, films 5 % and
  5 %, editorials 43 % and 44 %), and 89 to 95 % of them are what most raters say.

Measured on all texts, the share of one rater's answers that differ from the mean's:

| | texts | differ | differ, of texts whose mean is not neutral |
|---|---|---|---|
| tweets | 4200 | 19.1 % | 14.2 % |
| Amazon | 3708 | 14.3 % | 9.6 % |
| films | 10605 | 11.2 % | 7.8 % |
| editorials | 5190 | 30.7 % | 29.4 % |

The second column is the label noise of the training rows. The noise is not spread evenly: it is where people disagree.
"""

import html
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slsam_peft.data.packages import VADER
from slsam_peft.data.splits import ALL, Sizes, Splits, split, user_asks
from slsam_peft.packages import fetch

if TYPE_CHECKING:
    from slsam_peft.data.scoring import Pair

KINDS = {  # what a text is called in the prompt, and the names of its two files
    "tweets": ("tweet", "tweets"),
    "amazon": ("product review", "amazonReviewSnippets"),
    "films": ("film review", "movieReviewSnippets"),
    "editorials": ("sentence from an editorial", "nytEditorialSnippets"),
}


@dataclass(frozen=True)
class Rated:
    """A text and every rater's score of it, from -4 to 4."""

    text: str
    scores: tuple[int, ...]

    def answer_of_all(self) -> str:
        """Return the sign of the mean, which is neutral between -0.5 and 0.5."""
        doubled = 2 * sum(self.scores)
        return _answer((doubled >= len(self.scores)) - (doubled <= -len(self.scores)))

    def answer_of_one(self, seed: int) -> str:
        """Return the sign of the score of a rater who is drawn with `seed` and the text."""
        return _answer(random.Random(f"{seed} {self.text}").choice(self.scores))

    def disagreement(self) -> float:
        """Return the share of raters whose answer is not that of all."""
        return sum(_answer(score) != self.answer_of_all() for score in self.scores) / len(self.scores)


def rater_noise(kind: str, sizes: Sizes = ALL, seed: int = 0) -> "Splits[Pair]":
    """Build questions on the sentiment of texts; training answers are one rater's, held-out ones those of all.

    Args:
        kind (`str`): `"tweets"`, `"amazon"`, `"films"` or `"editorials"`.
        sizes (`Sizes`, *optional*): How many rows are taken.
        seed (`int`, defaults to `0`): Seed of the training texts, their order and the rater of each.

    Raises:
        UserError: the package cannot be fetched, or there are fewer rows than asked for.
    """
    noun = KINDS[kind][0]

    def pair(rated: Rated, answer: str) -> "Pair":
        return user_asks(f"Is the sentiment of this {noun} positive, negative or neutral?\n\n{rated.text}", answer)

    texts = split(kind, rated_texts(kind), lambda rated: rated.text, sizes, seed)
    return Splits(
        [pair(rated, rated.answer_of_one(seed)) for rated in texts.train],
        [pair(rated, rated.answer_of_all()) for rated in texts.validation],
        [pair(rated, rated.answer_of_all()) for rated in texts.test],
    )


def rated_texts(kind: str) -> list[Rated]:
    """Return all texts of a kind, each with its scores."""
    stem = KINDS[kind][1]
    (member,) = VADER.files
    with tarfile.open(fetch(VADER) / member) as archive:
        texts = _columns(archive, f"{stem}_GroundTruth.txt", last=2)
        # The ground truth of 196 tweets states another mean (of the same answer) than that of the scores.
        scores = _columns(archive, f"{stem}_anonDataRatings.txt", last=3)
    return [Rated(html.unescape(text).strip(), tuple(json.loads(scores[number]))) for number, text in texts.items()]


def _columns(archive: tarfile.TarFile, name: str, last: int) -> dict[str, str]:
    """Return column `last` of a tab-separated file, by the identifier in the first."""
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None, name  # the archive is the pinned one
    lines = file.read().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    rows = (line.split("\t") for line in lines if line)
    return {row[0]: row[last] for row in rows}


def _answer(score: int) -> str:
    return "positive" if score > 0 else "negative" if score < 0 else "neutral"


def noise(texts: Sequence[Rated]) -> float:
    """Return the expected share of one rater's answers that differ from those of all, one rater for each text."""
    return sum(rated.disagreement() for rated in texts) / len(texts)
