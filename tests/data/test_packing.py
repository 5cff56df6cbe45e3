"""Which examples share a row."""

import itertools

import numpy as np
import pytest

from tuning.data import packing
from tuning.data.packing import apart, pack, pack_sides


def rows(lengths, capacity):
    order, starts = pack(lengths, capacity)
    return [order[a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_the_longest_go_first_and_each_into_the_fullest_row_that_takes_it():
    assert rows([3, 7, 5, 2, 3], 10) == [[0, 1], [2, 3, 4]]
    assert rows([10, 10], 10) == [[0], [1]]
    assert rows([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]
    assert rows([], 10) == []


def test_packing_loses_nothing_and_overfills_nothing():
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    order, starts = pack(lengths, 64)
    assert sorted(order.tolist()) == list(range(2000))
    filled = np.add.reduceat(lengths[order], starts[:-1])
    assert filled.max() <= 64
    assert filled.sum() == lengths.sum()
    assert len(filled) <= 1.02 * lengths.sum() / 64


def test_packing_is_the_same_every_time():
    lengths = np.random.default_rng(1).integers(1, 65, 500)
    assert rows(lengths, 64) == rows(lengths.tolist(), 64)


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_what_does_not_fit_is_refused(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 10"):
        pack(lengths, 10)


def test_rows_of_two_sides_respect_both():
    order, starts = pack_sides(np.array([[3, 2], [1, 7], [6, 1], [1, 1], [2, 3]]), (10, 8))
    assert [order[a:b].tolist() for a, b in itertools.pairwise(starts)] == [[0, 3, 4], [1, 2]]


@pytest.mark.parametrize("block", [packing.BLOCK, 130])
def test_packing_two_sides_loses_nothing_and_wastes_little(monkeypatch, block):
    monkeypatch.setattr(packing, "BLOCK", block)
    first = np.random.default_rng(0).integers(1, 65, 2000)
    sizes = np.stack([first, first // 2 + 1], axis=1)
    order, starts = pack_sides(sizes, (64, 33))
    assert sorted(order.tolist()) == list(range(2000))
    filled = np.add.reduceat(sizes[order], starts[:-1])
    assert (filled <= (64, 33)).all() and (filled.sum(0) == sizes.sum(0)).all()
    assert len(filled) <= 1.08 * (sizes.sum(0) / (64, 33)).max()
    again = pack_sides(sizes.copy(), [64, 33])
    assert again[0].tolist() == order.tolist() and again[1].tolist() == starts.tolist()


@pytest.mark.parametrize("sizes", [[[3, 9]], [[11, 1]], [[0, 3]]])
def test_sides_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="do not fit rows of"):
        pack_sides(np.array(sizes), (10, 8))


def test_apart_is_one_example_per_row():
    order, starts = apart(3)
    assert order.tolist() == [0, 1, 2]
    assert starts.tolist() == [0, 1, 2, 3]
