"""Leaves by name."""

import numpy as np

from tuning.core import tree

PARAMS = {"a": {"x": np.zeros((2, 3)), "y": np.zeros(4)}, "b": np.zeros(())}


def test_flatten_and_unflatten_are_inverse():
    flat = tree.flatten(PARAMS)
    assert list(flat) == ["a/x", "a/y", "b"]
    assert tree.flatten(tree.unflatten(flat)).keys() == flat.keys()


def test_split_and_merge_are_inverse():
    yes, no = tree.split(PARAMS, lambda name: name.startswith("a/"))
    assert list(tree.flatten(yes)) == ["a/x", "a/y"] and list(tree.flatten(no)) == ["b"]
    assert tree.flatten(tree.merge(yes, no)).keys() == tree.flatten(PARAMS).keys()


def test_sizes_count_elements_and_bytes():
    assert tree.size(PARAMS) == 11
    assert tree.nbytes(PARAMS) == 88


def test_a_difference_names_missing_unexpected_and_misshaped_leaves():
    other = {"a": {"x": np.zeros((3, 2))}, "b": np.zeros(()), "c": np.zeros(1)}
    text = tree.difference(PARAMS, other)
    assert "missing: a/y" in text and "unexpected: c" in text and "a/x (3, 2), expected (2, 3)" in text
    assert tree.difference(PARAMS, PARAMS) == ""
