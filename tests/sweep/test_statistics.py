"""Means, intervals, paired tests and Holm's correction, against scipy and against values worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from tuning.sweep import statistics
from tuning.sweep.statistics import PairedTest

RNG = np.random.default_rng(0)


def test_a_mean_of_three_by_hand():
    # 1, 2, 6: deviations -2, -1, 3; s^2 = 14 / 2 = 7; error = sqrt(7 / 3); t(0.975, 2) = 4.302653
    found = statistics.summarise([1.0, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert found.error == pytest.approx(1.5275252316519468, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((3 - 4.302652729911275 * found.error, 3 + 4.302652729911275 * found.error), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_means_and_intervals_are_those_of_scipy(n):
    values = RNG.normal(4, 0.1, n)
    found = statistics.summarise(list(values))
    assert found.error == pytest.approx(stats.sem(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values)), rel=1e-9)


def test_one_value_has_no_error_and_none_has_no_mean():
    assert statistics.summarise([2.5]) == statistics.Summary(1, 2.5, None, None, None)
    with pytest.raises(ValueError, match="no values"):
        statistics.summarise([])


def test_a_paired_test_by_hand():
    # differences 1, 2, 3: mean 2, error 1 / sqrt 3, t = 2 sqrt 3; with 2 degrees p = 1 - t / sqrt(t^2 + 2)
    found = statistics.paired({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (found.n, found.difference, found.t) == (3, 2.0, pytest.approx(2 * math.sqrt(3), rel=1e-12))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9) and found.adjusted is None


@pytest.mark.parametrize("n", [2, 3, 10])
def test_paired_tests_are_those_of_scipy(n):
    ours, theirs = RNG.normal(0, 1, (2, n))
    found = statistics.paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs)
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_only_seeds_that_both_have_are_paired():
    ours, theirs = {0: 1.0, 1: 2.0, 5: 9.0, 7: 3.0}, {7: 2.0, 1: 0.5, 0: 0.8, 6: 100.0}
    found = statistics.paired(ours, theirs)
    expected = stats.ttest_rel([1.0, 2.0, 3.0], [0.8, 0.5, 2.0])
    assert (found.n, found.p) == (3, pytest.approx(expected.pvalue, rel=1e-9))
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None


def test_one_pair_and_differences_that_do_not_vary_have_no_p():
    assert statistics.paired({0: 1.0}, {0: 0.25}) == PairedTest(1, 0.75)
    assert statistics.paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}) == PairedTest(2, 0.5)
    assert statistics.paired({0: 0.3, 1: 0.4}, {0: 0.1, 1: 0.2}).p is None  # equal but for rounding
    assert statistics.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == PairedTest(2, 0.0)


def test_holm_by_hand():
    # 0.01 x 4; 0.02 x 3; 0.03 x 2 = 0.06 too; 0.5 x 1. The test without a p is not counted.
    tests = [PairedTest(3, 1, 1, p) for p in (0.03, 0.01)] + [PairedTest(1, 1), None] + [PairedTest(3, 1, 1, p) for p in (0.5, 0.02)]
    adjusted = [test and test.adjusted for test in statistics.holm(tests)]
    assert adjusted == [pytest.approx(0.06), pytest.approx(0.04), None, None, 0.5, pytest.approx(0.06)]


def test_holm_never_falls_and_never_passes_one():
    adjusted = [test.adjusted for test in statistics.holm([PairedTest(3, 1, 1, p) for p in (0.04, 0.03, 0.6, 0.7)])]
    assert adjusted == [pytest.approx(0.12), pytest.approx(0.12), 1.0, 1.0]
    assert statistics.holm([PairedTest(3, 1, 1, 0.04)])[0].adjusted == 0.04
