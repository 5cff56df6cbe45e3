"""Spaces: which points a sweep has. A point is {dotted config key: value}, what one run changes of the sweep's config.

    product(
        chain(
            grid({"method.name": ["lora"], "method.rank": [4, 16]}),        # keys that only this branch has
            grid({"method.name": ["ia3"]}),
        ),
        log_uniform("optimizer.learning_rate", 1e-5, 1e-3),                 # drawn: needs random(..., count) or a search around it
        seeds(3),
    )

A space is a value; nothing is drawn when it is made. `points` lists the points of a space without continuous domains, in an order where the
last key changes fastest. `draw` walks through any space once and lets its caller pick each value: a random number, or a search's trial.
"""

from __future__ import annotations

import dataclasses
import math
import random as randoms
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Integers:
    """A whole number from low to high, both included."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A real number from low to high; with `log` its logarithm is even."""

    low: float
    high: float
    log: bool = False


Domain = Choice | Integers | Uniform
Pick = Callable[[str, Domain], Any]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A key and the values it takes."""

    key: str
    domain: Domain


@dataclasses.dataclass(frozen=True)
class Zipped:
    """Keys that change together: the i-th row has the values of all of them."""

    keys: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """Each point of the first with each point of the second, and so on."""

    spaces: tuple[Space, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """The points of the first, then those of the second, and so on."""

    spaces: tuple[Space, ...]


@dataclasses.dataclass(frozen=True)
class When:
    """The keys of `space`, where an earlier key has this value; no keys elsewhere."""

    key: str
    value: Any
    space: Space


@dataclasses.dataclass(frozen=True)
class Random:
    """Some points of `space`, each drawn by itself; no two are the same."""

    space: Space
    count: int
    seed: int


Space = Axis | Zipped | Product | Chain | When | Random


def grid(axes: Mapping[str, Sequence[Any]]) -> Space:
    """All combinations of the values of some keys."""
    return product(*(choice(key, *_listed(key, values)) for key, values in axes.items()))


def zipped(axes: Mapping[str, Sequence[Any]]) -> Space:
    """The i-th values of all keys together. ValueError if one has more values than another."""
    counts = {key: len(_listed(key, values)) for key, values in axes.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"zipped keys have as many values as one another, not {counts}.")
    return Zipped(tuple(axes), tuple(zip(*axes.values(), strict=True)))


def product(*spaces: Space) -> Space:
    """Each point of one space with each of the next. What has a key twice is refused when its points are listed or drawn."""
    return spaces[0] if len(spaces) == 1 else Product(spaces)


def chain(*spaces: Space) -> Space:
    """The points of one space after those of the other; each has its own keys. Drawn from, each is as likely as the others."""
    if not spaces:
        raise ValueError("chain() of no space has no point. Give some.")
    return Chain(spaces)


def when(key: str, value: Any, space: Space) -> Space:
    """The keys of `space` only where a key before it in the product has this value."""
    return When(key, value, space)


def seeds(count: int, first: int = 0) -> Space:
    """The same with other random numbers: `seed` from `first` on. What compares runs averages over it."""
    if count < 1:
        raise ValueError(f"seeds({count}): give at least 1.")
    return choice("seed", *range(first, first + count))


def choice(key: str, *values: Any) -> Space:
    """One of some values. ValueError for none, or for the same one twice."""
    if not values:
        raise ValueError(f"{key} has no values to choose from.")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{key} has the value {twice[0]!r} twice.")
    return Axis(key, Choice(values))


def integers(key: str, low: int, high: int) -> Space:
    """A whole number from low to high, both included."""
    _ordered(key, low, high)
    return Axis(key, Integers(low, high))


def uniform(key: str, low: float, high: float) -> Space:
    """A real number between low and high."""
    _ordered(key, low, high)
    return Axis(key, Uniform(low, high))


def log_uniform(key: str, low: float, high: float) -> Space:
    """A positive number whose logarithm is even between those of low and high: for rates."""
    _ordered(key, low, high)
    if low <= 0:
        raise ValueError(f"log_uniform({key}): low={low} must be greater than 0.")
    return Axis(key, Uniform(low, high, log=True))


def random(space: Space, count: int, seed: int = 0) -> Space:
    """`count` different points drawn from a space: the same ones for every point that it is multiplied with, as for a paired comparison.

    More points of the same seed begin with these ones.
    """
    if count < 1:
        raise ValueError(f"random(count={count}): give at least 1.")
    return Random(space, count, seed)


def keys(space: Space) -> list[str]:
    """The keys that a point of the space may have."""
    match space:
        case Axis():
            return [space.key]
        case Zipped():
            return list(space.keys)
        case Product() | Chain():
            return list(dict.fromkeys(key for inner in space.spaces for key in keys(inner)))
        case When() | Random():
            return keys(space.space)


def points(space: Space) -> list[Point]:
    """All points of a space. ValueError for a continuous domain outside `random`, naming its key."""
    return list(_expand(space, {}))


def _expand(space: Space, point: Point) -> Iterator[Point]:
    """The points that go on from one, by what the space adds to it."""
    match space:
        case Axis(key, Choice(values)):
            yield from (_with(point, {key: value}) for value in values)
        case Axis(key, Integers(low, high)):
            yield from (_with(point, {key: value}) for value in range(low, high + 1))
        case Axis(key, Uniform(low, high)):
            raise ValueError(f"{key} takes any number from {low} to {high}: that is no list of runs. Draw some with random(space, count).")
        case Zipped():
            yield from (_with(point, dict(zip(space.keys, row, strict=True))) for row in space.rows)
        case Product():
            if not space.spaces:
                yield point
            else:
                for begun in _expand(space.spaces[0], point):
                    yield from _expand(Product(space.spaces[1:]), begun)
        case Chain():
            for inner in space.spaces:
                yield from _expand(inner, point)
        case When():
            yield from _expand(space.space, point) if _holds(space, point) else [point]
        case Random():
            yield from _drawn(space, point)


def _drawn(space: Random, point: Point) -> Iterator[Point]:
    rng, found = randoms.Random(space.seed), []
    for _ in range(100 * space.count):
        new = _walk(space.space, lambda _, domain: sample(domain, rng), point, "")
        if new not in found:
            found.append(new)
            yield new
        if len(found) == space.count:
            return
    raise ValueError(f"random(count={space.count}): {len(found)} different points were found, and hardly any more exist. Lower the count.")


def draw(space: Space, pick: Pick) -> Point:
    """One point, each value as `pick(key, domain)` gives it.

    What is picked is a key's value from its domain or, where a whole is picked, its number out of a Choice: the row of `zipped` keys (its
    key is theirs, joined by commas) and the branch of a chain (its key is `branch` with the chain's place in the space).
    """
    return _walk(space, pick, {}, "")


def _walk(space: Space, pick: Pick, point: Point, place: str) -> Point:
    match space:
        case Axis():
            return _with(point, {space.key: pick(space.key, space.domain)})
        case Zipped():
            row = space.rows[pick(",".join(space.keys), Choice(tuple(range(len(space.rows)))))]
            return _with(point, dict(zip(space.keys, row, strict=True)))
        case Product():
            for number, inner in enumerate(space.spaces):
                point = _walk(inner, pick, point, f"{place}.{number}")
            return point
        case Chain():
            branch = pick(f"branch{place}", Choice(tuple(range(len(space.spaces)))))
            return _walk(space.spaces[branch], pick, point, f"{place}.{branch}")
        case When():
            return _walk(space.space, pick, point, f"{place}.0") if _holds(space, point) else point
        case Random():
            return _walk(space.space, pick, point, place)


def sample(domain: Domain, rng: randoms.Random) -> Any:
    """A value of a domain, all of them as likely."""
    match domain:
        case Choice(values):
            return values[rng.randrange(len(values))]
        case Integers(low, high):
            return rng.randint(low, high)
        case Uniform(low, high, log):
            value = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
            return min(max(value, low), high)


def _with(point: Point, more: Point) -> Point:
    if again := [key for key in more if key in point]:
        raise ValueError(f"{again[0]} is set twice in one point, as {point[again[0]]!r} and {more[again[0]]!r}. Keep one of them.")
    return {**point, **more}


def _holds(space: When, point: Point) -> bool:
    if space.key not in point:
        raise ValueError(f"when({space.key!r}, {space.value!r}, ...) has no {space.key} before it: it has {', '.join(point) or 'no key'}.")
    return point[space.key] == space.value


def _listed(key: str, values: Any) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{key}={values!r}: give a list of values.")
    return values


def _ordered(key: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{key}: low={low} must be less than high={high}.")
