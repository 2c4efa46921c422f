"""Computes paired differences between methods, with intervals and p-values."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
LEAST_FOR_STATISTICS = 3  # seeds


@dataclass(frozen=True)
class Difference:
    """A method against the reference, seed by seed.

    Args:
        values (`dict[int, float]`): Score of the method minus that of the reference, by seed.
        mean (`float`): Their mean.
        low, high (`float`): Ends of the 95 % interval of the mean that belongs to the paired t-test; NaN for fewer
            than 3 seeds. Of normal values, however few, it holds the true mean in 95 % of cases.
        p (`float`): Two-sided p-value of the paired t-test; NaN for fewer than 3 seeds, and where all differences are
            the same number other than 0, which says nothing of how they scatter.
    """

    values: Mapping[int, float]
    mean: float
    low: float
    high: float
    p: float

    @cached_property
    def bootstrap(self) -> tuple[float, float]:
        """Ends of the 95 % bootstrap interval of the mean (bias-corrected and accelerated), for any distribution.

        NaN for fewer than 3 seeds. Of few values it is too narrow: of five normal ones it holds the true mean in about
        83 % of cases, of three in about 70 % (simulated).
        """
        return _bootstrap(np.array(list(self.values.values())))


def paired_difference(method: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Compare two sets of scores on the seeds they share; `None` where they share none.

    Args:
        method (`dict[int, float]`): Scores of a method, by seed.
        reference (`dict[int, float]`): Scores of the reference, by seed.
    """
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        return None
    values = {seed: method[seed] - reference[seed] for seed in seeds}
    array = np.array(list(values.values()))
    low, high = t_interval(array)
    return Difference(values, float(array.mean()), low, high, _p_value(array))


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    if len(values) < LEAST_FOR_STATISTICS:
        return math.nan, math.nan
    if np.ptp(values) == 0:  # every resample has this mean
        return float(values[0]), float(values[0])
    done = stats.bootstrap((values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, rng=0)
    return float(done.confidence_interval.low), float(done.confidence_interval.high)


def _p_value(values: np.ndarray) -> float:
    if len(values) < LEAST_FOR_STATISTICS:
        return math.nan
    if np.ptp(values) == 0:
        return math.nan if values[0] else 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly equal values: the p-value is tiny, not wrong
        result: Any = stats.ttest_1samp(values, 0.0)
    return float(result.pvalue)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean that belongs to the paired t-test; NaN for fewer than 3 values."""
    if len(values) < LEAST_FOR_STATISTICS:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for how many there are (Holm 1979); NaN stays NaN and is not counted."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(order) - rank)))
        corrected[i] = largest
    return corrected
