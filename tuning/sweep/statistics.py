"""What is said of numbers that were measured a few times: means with their uncertainty, paired tests, many tests at once.

Student, The Probable Error of a Mean (Biometrika 1908); Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from scipy import special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Summary:
    """A mean of n values with its standard error and confidence interval; None where one value alone tells nothing of them."""

    n: int
    mean: float
    error: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """A paired t test: n pairs, the mean of their differences, and how often chance alone would make it as large.

    t and p are None where there are fewer than two pairs, or where the differences do not vary.
    adjusted  p corrected for the tests made along with this one
    """

    n: int
    difference: float
    t: float | None = None
    p: float | None = None
    adjusted: float | None = None


def summarise(values: Sequence[float]) -> Summary:
    """ValueError for no values."""
    if not values:
        raise ValueError("There is no mean of no values.")
    mean, error = _mean(values), standard_error(values)
    if error is None:
        return Summary(len(values), mean, None, None, None)
    reach = float(special.stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return Summary(len(values), mean, error, mean - reach, mean + reach)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: the standard deviation with n - 1, over the root of n."""
    n, mean = len(values), _mean(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else None


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedTest | None:
    """Compares {seed: value} with {seed: value} over the seeds that both have; None if they have none in common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, error = _mean(differences), standard_error(differences)
    # Differences that are equal but for rounding tell of no chance at all, so no chance can be computed from them.
    if error is None or error <= 1e-12 * max(map(abs, (*ours.values(), *theirs.values()))):
        return PairedTest(len(differences), mean)
    t = mean / error
    return PairedTest(len(differences), mean, t, float(2 * special.stdtr(len(differences) - 1, -abs(t))))


def holm(tests: Sequence[PairedTest | None]) -> list[PairedTest | None]:
    """The tests with p corrected for there being several: the smallest times their number, the next times one less, and never falling."""
    order = sorted((test.p, i) for i, test in enumerate(tests) if test is not None and test.p is not None)
    adjusted, least = list(tests), 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        test = tests[i]
        assert test is not None
        adjusted[i] = dataclasses.replace(test, adjusted=least)
    return adjusted


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
