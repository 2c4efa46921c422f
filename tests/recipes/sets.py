"""The sets of rows in the tables at the top of recipes/compare/README.md, and where each lies."""

from typing import NamedTuple


class Task(NamedTuple):
    """A line of the table of tasks: what the page calls it, and what its methods are called in the comparison."""

    words: str
    comparison: str
    task: str
    default: str = ""  # at a rate of its own
    drop_in: str = ""  # the default at plain LoRA's rate
    fewer: str = ""  # plain LoRA with fewer steps


DROP_IN, THIRD, HALF = "auto at plain LoRA's rate", "plain, a third of the steps", "plain, half of the steps"
OLD_NAME = "auto, default rise of the loss"

TWEETS, REVIEWS = "32 tweets, one rater's answer each", "32 reviews, one rater's answer each"
SUMS = "64 sums, a quarter wrong, in steps of sixteen"
LEARNING, DOCUMENTATION = "96 sums seen four times, a quarter wrong", "96 questions seen four times, a quarter wrong"

FRESH = [
    Task(TWEETS, "raters", "tweets-repeated", "auto", DROP_IN, THIRD),
    Task(f"{TWEETS}, in steps of sixteen", "tweets_batch16", "tweets-repeated", "auto", DROP_IN, HALF),
    Task(f"{TWEETS}, on Gemma 3 270M", "gemma_tweets", "tweets-repeated", "auto", DROP_IN, THIRD),
    Task(f"{TWEETS}, on a 4-bit base", "nf4", "tweets-repeated", "auto", DROP_IN, THIRD),
    Task("128 tweets, one rater's answer each, seen eight times", "larger", "tweets-128", "auto", DROP_IN, THIRD),
    Task(REVIEWS, "amazon", "reviews-repeated", "auto", DROP_IN, THIRD),
    Task(f"{REVIEWS}, in steps of sixteen", "amazon_batch16", "reviews-repeated", "auto", DROP_IN, HALF),
    Task(f"{REVIEWS}, on Gemma 3 270M", "gemma_reviews", "reviews-repeated", "auto", DROP_IN, THIRD),
    Task(f"{REVIEWS}, on a 4-bit base", "nf4", "reviews-repeated", "auto", DROP_IN, THIRD),
    Task("128 reviews, one rater's answer each, seen eight times", "larger", "reviews-128", "auto", DROP_IN, THIRD),
    Task("32 sums, a quarter wrong", "fresh", "sums-32-label-noise", "auto", DROP_IN, THIRD),
    Task("32 sums, none wrong", "fresh", "sums-32-clean", "auto", DROP_IN, THIRD),
    Task("32 film reviews (SST-2)", "instructions", "sentiment", "auto", "", THIRD),
    Task("32 science questions (SciQ)", "instructions", "science", "auto", "", THIRD),
    Task("24 yes-or-no questions on a paragraph (BoolQ)", "instructions", "reading", "auto", "", THIRD),
    Task("16 word problems (GSM8K)", "instructions", "reasoning", "auto", "", THIRD),
    Task(SUMS, "fresh_batch16", "sums-64-label-noise", "auto", DROP_IN, HALF),
    Task(f"{SUMS}, other seeds", "confirm_batch16", "sums-64-label-noise", "auto", DROP_IN, HALF),
]
# Kinds of rows, by their sources.
GROUPS = {
    "sums": ("reasoning_gym",),
    "tweets and reviews": ("tweets", "amazon"),
    "instruction tasks": ("sst2", "sciq", "boolq", "gsm8k"),
}
SEEN = [
    Task(LEARNING, "auto_sums", "sums-small-label-noise", drop_in=OLD_NAME),
    Task("640 sums seen at most once, none wrong", "auto_sums", "sums-seen-once", drop_in=OLD_NAME),
    Task(DOCUMENTATION, "auto_docs", "docs-small-label-noise", "auto"),
    Task("32 sums, a quarter wrong", "rivals", "sums-32-label-noise", "auto", DROP_IN, THIRD),
    Task("64 sums, a quarter wrong", "auto_epochs", "sums-64-label-noise", OLD_NAME),
    Task(SUMS, "auto_batch16", "sums-64-label-noise", "auto", "", HALF),
]
