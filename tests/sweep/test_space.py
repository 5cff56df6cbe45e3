"""Spaces: which points they have, in which order, and that what is nonsense is refused when they are made or listed."""

import random as randoms

import pytest

from tuning.sweep import space
from tuning.sweep.space import chain, choice, grid, integers, log_uniform, points, product, seeds, uniform, when, zipped


def test_a_grid_has_all_combinations_and_the_last_key_changes_fastest():
    assert points(grid({"a": [1, 2], "b.c": ["x", "y"]})) == [
        {"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}, {"a": 2, "b.c": "x"}, {"a": 2, "b.c": "y"},
    ]  # fmt: skip
    assert points(grid({})) == [{}]


def test_zipped_keys_change_together():
    assert points(zipped({"a": [1, 2], "b": [3, 4]})) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ValueError, match=r"as many values as one another, not {'a': 1, 'b': 2}"):
        zipped({"a": [1], "b": [3, 4]})


def test_a_chain_gives_each_branch_its_own_keys():
    made = product(chain(grid({"method": ["lora"], "rank": [4, 8]}), grid({"method": ["ia3"]})), seeds(2))
    assert points(made) == [
        {"method": "lora", "rank": 4, "seed": 0}, {"method": "lora", "rank": 4, "seed": 1},
        {"method": "lora", "rank": 8, "seed": 0}, {"method": "lora", "rank": 8, "seed": 1},
        {"method": "ia3", "seed": 0}, {"method": "ia3", "seed": 1},
    ]  # fmt: skip


def test_a_conditional_key_is_there_only_where_its_condition_holds():
    made = product(choice("m", "lora", "ada", "ia3"), when("m", "lora", grid({"rank": [4, 8]})), when("m", "ada", grid({"rank": [6]})))
    assert points(made) == [{"m": "lora", "rank": 4}, {"m": "lora", "rank": 8}, {"m": "ada", "rank": 6}, {"m": "ia3"}]
    with pytest.raises(ValueError, match=r"when\('m', 'lora', \.\.\.\) has no m before it"):
        points(product(when("m", "lora", seeds(2)), choice("m", "lora", "ia3")))


def test_random_points_are_in_their_domains_and_more_of_them_begin_with_the_same():
    domains = product(log_uniform("lr", 1e-5, 1e-3), uniform("dropout", 0.0, 0.5), integers("rank", 1, 4), choice("m", "a", "b"))
    few, many = points(space.random(domains, 5, seed=3)), points(space.random(domains, 400, seed=3))
    assert many[:5] == few != points(space.random(domains, 5, seed=4))
    assert all(1e-5 <= p["lr"] <= 1e-3 and 0 <= p["dropout"] <= 0.5 for p in many)
    assert {p["rank"] for p in many} == {1, 2, 3, 4} and {p["m"] for p in many} == {"a", "b"}
    # Half of the rates lie below the geometric mean of the ends, a tenth of the dropouts below a tenth of their range.
    assert 160 < sum(p["lr"] < 1e-4 for p in many) < 240
    assert 20 < sum(p["dropout"] < 0.05 for p in many) < 60


def test_every_point_of_a_product_gets_the_same_random_points():
    found = points(product(choice("m", "a", "b"), space.random(log_uniform("lr", 1e-5, 1e-3), 3), seeds(2)))
    assert len(found) == 12
    rates = {m: [p["lr"] for p in found if p["m"] == m] for m in "ab"}
    assert rates["a"] == rates["b"] and rates["a"][0] == rates["a"][1] != rates["a"][2]


def test_random_points_differ_and_more_than_there_are_is_refused():
    found = points(space.random(grid({"a": [1, 2, 3], "b": [1, 2]}), 6))
    assert sorted(map(str, found)) == sorted(map(str, points(grid({"a": [1, 2, 3], "b": [1, 2]}))))
    with pytest.raises(ValueError, match=r"random\(count=7\): 6 different points were found"):
        points(space.random(grid({"a": [1, 2, 3], "b": [1, 2]}), 7))


def test_a_continuous_domain_is_no_list_of_runs():
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate takes any number from 1e-05 to 0\.001.*random\(space, count\)"):
        points(product(seeds(2), log_uniform("optimizer.learning_rate", 1e-5, 1e-3)))


def test_a_draw_asks_for_each_value_once_and_says_what_it_may_be():
    made = product(
        chain(grid({"m": ["lora"], "rank": [4, 8]}), grid({"m": ["ia3"]})),
        zipped({"a": [1, 2], "b": [3, 4]}), log_uniform("lr", 1e-5, 1e-3), when("m", "lora", integers("n", 1, 3)),
    )  # fmt: skip
    asked = {}

    def pick(key, domain):
        assert key not in asked
        asked[key] = domain
        return domain.values[-1] if isinstance(domain, space.Choice) else domain.high

    assert space.draw(made, pick) == {"m": "ia3", "a": 2, "b": 4, "lr": 1e-3}
    assert asked == {
        "branch.0": space.Choice((0, 1)), "m": space.Choice(("ia3",)), "a,b": space.Choice((0, 1)), "lr": space.Uniform(1e-5, 1e-3, True),
    }  # fmt: skip
    rng = randoms.Random(0)
    drawn = [space.draw(made, lambda _, domain: space.sample(domain, rng)) for _ in range(50)]
    assert {tuple(point) for point in drawn} == {("m", "rank", "a", "b", "lr", "n"), ("m", "a", "b", "lr")}


NONSENSE = {
    "a key twice": (lambda: points(product(seeds(2), grid({"seed": [1]}))), "seed is set twice in one point, as 0 and 1"),
    "a value twice": (lambda: grid({"a": [1, 2, 1.0]}), "a has the value 1.0 twice"),
    "no value": (lambda: grid({"a": []}), "a has no values"),
    "no list": (lambda: grid({"a": "lora"}), "a='lora': give a list"),
    "no branch": (lambda: chain(), "of no space"),
    "no seed": (lambda: seeds(0), "at least 1"),
    "no count": (lambda: space.random(seeds(2), 0), "at least 1"),
    "upside down": (lambda: uniform("a", 1.0, 0.0), "low=1.0 must be less than high=0.0"),
    "logarithm of 0": (lambda: log_uniform("a", 0.0, 1.0), "low=0.0 must be greater than 0"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused(what):
    make, message = NONSENSE[what]
    with pytest.raises(ValueError, match=message):
        make()
