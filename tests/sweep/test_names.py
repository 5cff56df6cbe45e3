"""Names of runs: only what differs, as short as it can be said, the same ones when the sweep grows."""

import pytest

from tuning.sweep.names import names
from tuning.sweep.space import chain, grid, points, product, seeds


def test_only_what_differs_is_said_in_the_shortest_way():
    made = product(grid({"optimizer.learning_rate": [1e-05, 0.00031, 0.05], "train.steps": [100]}), seeds(2))
    assert names(points(made)) == [
        "learning_rate=1e-5,seed=0", "learning_rate=1e-5,seed=1", "learning_rate=3.1e-4,seed=0", "learning_rate=3.1e-4,seed=1",
        "learning_rate=0.05,seed=0", "learning_rate=0.05,seed=1",
    ]  # fmt: skip


def test_a_part_is_said_by_its_value_and_the_seed_comes_last():
    made = product(seeds(2), chain(grid({"method.name": ["lora"], "method.rank": [4, 8]}), grid({"method.name": ["ia3"]})))
    assert names(points(made))[:3] == ["lora,rank=4,seed=0", "lora,rank=8,seed=0", "ia3,seed=0"]


def test_ends_of_keys_are_as_long_as_it_takes_to_tell_them_apart():
    made = grid({"data.train.length": [1, 2], "data.eval.length": [1], "method.rank": [1]})
    assert names(points(made)) == ["length=1", "length=2"]
    assert names(points(grid({"data.train.length": [1, 2], "data.eval.length": [3, 4]})))[0] == "train.length=1,eval.length=3"
    assert names([{"a.b": 1, "b": 1}, {"a.b": 2, "b": 2}])[0] == "a.b=1,b=1"


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0.123456, 0.5], ["0.123", "0.5"]),
        ([0.123456, 0.12344], ["0.1235", "0.1234"]),
        ([0.0, -2.5, 100000.0, 32.0], ["0", "-2.5", "1e5", "32"]),
        ([1e-8, 1e22, 123456.0], ["1e-8", "1e22", "123000"]),
        ([True, False, None], ["True", "False", "None"]),
        ([("q", "v"), ("all",), ()], ["q+v", "all", "empty"]),
        (["/data/a.jsonl", "/data/b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["/a/x.jsonl", "/b/x.jsonl"], ["a-x.jsonl", "b-x.jsonl"]),
        (["..", "a b: c", "ü"], ["empty", "a-b-c", "ü"]),
    ],
    ids=str,
)
def test_values_are_written_shortly_and_fit_for_a_directory(values, texts):
    assert names([{"k": value} for value in values]) == [f"k={text}" for text in texts]


def test_one_point_is_called_by_all_that_it_changes():
    assert names([{"a": 1, "b": 2}]) == ["a=1,b=2"] and names([{}]) == ["base"]


def test_a_key_that_tells_points_apart_by_being_there_is_said():
    assert names([{"a": 1}, {"a": 1, "b": 2}, {"a": 3}]) == ["a=1", "a=1,b=2", "a=3"]


def test_a_sweep_that_grows_keeps_its_names():
    few = points(grid({"lr": [1e-3, 1e-4]}))
    before = dict(zip(names(few), few, strict=True))
    more = points(product(grid({"lr": [1e-3, 1e-4]}), chain(grid({}), grid({"rank": [8]}))))
    assert names(more, before) == ["lr=1e-3", "lr=1e-3,rank=8", "lr=1e-4", "lr=1e-4,rank=8"]
    drawn = [{"lr": 0.00123456}, {"lr": 0.00123499}]
    assert names(drawn, {"lr=1.23e-3": drawn[0]})[0] == "lr=1.23e-3"
    assert names([{"t": ("q", "v")}, {"t": ("q",)}], {"other": {"t": ["q", "v"]}}) == ["other", "t=q"]  # JSON has made a list of it


def test_points_that_are_there_twice_and_names_that_collide_are_refused():
    with pytest.raises(ValueError, match=r"The point {'a': 1} is there twice"):
        names([{"a": 1}, {"a": 2}, {"a": 1}])
    for one, other in (("x y", "x:y"), ("Lora", "lora"), (1, "1")):
        with pytest.raises(ValueError, match="would have one name"):
            names([{"a": one}, {"a": other}])
    with pytest.raises(ValueError, match="would have one name"):
        names([{"a": "x:y"}, {"a": "z"}], {"a=x-y": {"a": "x y"}})


def test_a_long_name_is_cut_and_still_its_own():
    made = names([{"k": "w" * 300 + end} for end in "ab"])
    assert len(set(made)) == 2 and all(len(name.encode()) <= 200 for name in made)
