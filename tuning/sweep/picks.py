"""What a search picks from: a space without its seeds, each thing to pick under a name of its own, and the space as JSON.

A key with one value is never picked. A key that has other values in another branch of the space is another parameter there: `rank` and
`rank#2`. Parameters are values that a study can store: a value that is none of those (a tuple of targets) is picked by its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tuning.sweep import space as spaces
from tuning.sweep.space import Axis, Chain, Choice, Domain, Integers, Point, Product, Random, Space, Uniform, When, Zipped

PLAIN = (str, int, float, bool, type(None))


def unseeded(space: Space) -> tuple[Space, tuple[int, ...]]:
    """(the space without its seeds, the seeds). ValueError where some points only have them."""
    match space:
        case Axis("seed", Choice(values)):
            return Product(()), values
        case Axis("seed", Integers(low, high)):
            return Product(()), tuple(range(low, high + 1))
        case Product(inner):
            split = [unseeded(one) for one in inner]
            found = [seeds for _, seeds in split if seeds]
            if len(found) > 1:
                raise ValueError("The space has seed twice. Keep one of them.")
            return Product(tuple(one for one, _ in split)), found[0] if found else ()
    if "seed" in spaces.keys(space):
        raise ValueError("A search trains each point with the same seeds: write seeds(n) in the product of the whole space, or --seeds=N.")
    return space, ()


class Parameters:
    """The parameters of a space. ValueError for a space that holds points already drawn, and for one with nothing to pick."""

    def __init__(self, space: Space):
        self.space, self._domains = space, dict[str, list[Domain]]()
        for key, domain in _picked(space, ""):
            known = self._domains.setdefault(key, [])
            if len(_ends(domain)) > 1 and domain not in known:
                known.append(domain)
        if not any(self._domains.values()):
            raise ValueError("The space has one point: there is nothing to search. Give keys several values, or ranges.")

    def _name(self, key: str, domain: Domain) -> str:
        number = self._domains[key].index(domain)
        return f"{key}#{number + 1}" if number else key

    def draw(self, suggest: Callable[[str, Domain], Any]) -> Point:
        """One point: `suggest(name, domain)` gives a parameter's value, where a choice's domain holds what a study can store."""

        def pick(key: str, domain: Domain) -> Any:
            if len(_ends(domain)) == 1:
                return _ends(domain)[0]
            if not isinstance(domain, Choice):
                return suggest(self._name(key, domain), domain)
            labels = _labels(domain)
            return domain.values[labels.index(suggest(self._name(key, domain), Choice(labels)))]

        return spaces.draw(self.space, pick)

    def grid(self) -> list[dict[str, Any]]:
        """The parameters of all points, the last one changing fastest. ValueError, naming the key, for a continuous domain."""
        found: list[dict[str, Any]] = []
        numbers: list[int] | None = []
        while numbers is not None:
            point: dict[str, Any] = {}
            taken: list[tuple[int, int]] = []  # (number, out of how many)

            def suggest(name: str, domain: Domain, at=numbers, point=point, taken=taken) -> Any:
                if isinstance(domain, Uniform):
                    raise ValueError(f"{name} takes any number from {domain.low} to {domain.high}, which no grid lists. Give it values.")
                values = range(domain.low, domain.high + 1) if isinstance(domain, Integers) else domain.values
                number = at[len(taken)] if len(taken) < len(at) else 0
                taken.append((number, len(values)))
                point[name] = values[number]
                return point[name]

            self.draw(suggest)
            found.append(point)
            while taken and taken[-1][0] + 1 == taken[-1][1]:
                taken.pop()
            numbers = [number for number, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None
        return found

    def corners(self) -> list[tuple[Point, dict[str, Domain]]]:
        """Points that have between them each listed value and both ends of each range, in each branch; with the parameters of each."""
        seen: set[tuple[str, int]] = set()
        found, todo = [], [dict[str, int]()]
        while todo:
            wanted, numbers, domains = todo.pop(0), dict[str, int](), dict[str, Domain]()

            def suggest(name: str, domain: Domain, wanted=wanted, numbers=numbers, domains=domains) -> Any:
                values, number = _ends(domain), wanted.get(name, 0)
                for other in range(len(values)):
                    if (name, other) not in seen:
                        seen.add((name, other))
                        todo.extend([{**numbers, name: other}] if other != number else [])
                numbers[name], domains[name] = number, domain
                return values[number]

            found.append((self.draw(suggest), domains))
        return found


def _picked(space: Space, place: str) -> Iterator[tuple[str, Domain]]:
    """(key, domain) of all that `space.draw` may ask for."""
    match space:
        case Axis(key, domain):
            yield key, domain
        case Zipped(keys, rows):
            yield ",".join(keys), Choice(tuple(range(len(rows))))
        case Product(inner):
            for number, one in enumerate(inner):
                yield from _picked(one, f"{place}.{number}")
        case Chain(inner):
            yield f"branch{place}", Choice(tuple(range(len(inner))))
            for number, one in enumerate(inner):
                yield from _picked(one, f"{place}.{number}")
        case When():
            yield from _picked(space.space, f"{place}.0")
        case Random():
            raise ValueError(f"random(count={space.count}) draws its points before a search begins. Leave it out; --trials says how many.")


def _ends(domain: Domain) -> tuple[Any, ...]:
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def _labels(domain: Choice) -> tuple[Any, ...]:
    plain = all(isinstance(value, PLAIN) for value in domain.values)
    return domain.values if plain else tuple(repr(value) for value in domain.values)


def packed(space: Any) -> Any:
    """A space as JSON holds it."""
    if dataclasses.is_dataclass(space):
        fields = {field.name: packed(getattr(space, field.name)) for field in dataclasses.fields(space)}
        return {"is": type(space).__name__, **fields}
    return [packed(value) for value in space] if isinstance(space, tuple | list) else space


def unpacked(plain: Any) -> Any:
    """The space that JSON holds; lists among its values have become tuples."""
    if isinstance(plain, dict):
        return NODES[plain["is"]](**{key: unpacked(value) for key, value in plain.items() if key != "is"})
    return tuple(unpacked(value) for value in plain) if isinstance(plain, list) else plain


NODES = {node.__name__: node for node in (Axis, Choice, Integers, Uniform, Zipped, Product, Chain, When, Random)}
