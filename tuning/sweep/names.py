"""Names of runs: of each point only what differs, as in `lora,rank=8,learning_rate=3e-4,seed=2`; each is a name of a directory."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from tuning.core import config as configs
from tuning.sweep.space import Point

DIGITS = 3  # of a number that was drawn, where they tell it apart
BYTES = 200  # a file system has 255 for a name, and some more characters are put to it


def names(points: Sequence[Point], taken: Mapping[str, Point] | None = None) -> list[str]:
    """A name for each point, in order. What stands in `taken` keeps the name that it has there.

    Keys are cut to their last parts as far as they stay apart, and the choice of a part (`method.name`) is said by its value alone.
    ValueError for a point that is there twice, and for two that would have one name, small and capital letters not counted.
    """
    taken = taken or {}
    known = {_identity(point): name for name, point in taken.items()}
    seen: set[str] = set()
    for point in points:
        if _identity(point) in seen:
            raise ValueError(f"The point {point} is there twice. Leave one out.")
        seen.add(_identity(point))
    every = [*points, *taken.values()]
    for chosen in _telling(every):  # a key that some points have, all with one value, is said where it is needed to tell them apart
        made = [known.get(_identity(point)) or _name(point, chosen, every) for point in points]
        owners = {name.casefold(): point for name, point in taken.items()}
        collide = [
            (owner, point)
            for name, point in zip(made, points, strict=True)
            if _identity(owner := owners.setdefault(name.casefold(), point)) != _identity(point)
        ]
        if not collide:
            return made
    one, other = collide[0]
    raise ValueError(f"The points {one} and {other} would have one name. Give them values that read differently.")


def label(point: Point, among: Sequence[Point]) -> str:
    """What a point is called next to others, where something else keeps their names apart."""
    every = [*among, point]
    return _name(point, _telling(every)[1], every)


def _telling(every: Sequence[Point]) -> tuple[list[str], list[str]]:
    """(keys whose values differ between points, those and the keys that not every point has), or all keys if no value differs."""
    ordered = dict.fromkeys(key for point in every for key in point)
    keys = sorted(ordered, key=lambda key: key == "seed")  # the others as they come
    differ = [key for key in keys if len({repr(point[key]) for point in every if key in point}) > 1] or keys
    return differ, [key for key in keys if key in differ or any(key not in point for point in every)]


def _name(point: Point, keys: Sequence[str], every: Sequence[Point]) -> str:
    said = []
    for key in keys:
        if key in point:
            text = _text(point[key], [other[key] for other in every if key in other])
            said.append(text if key.endswith(".name") else f"{_label(key, keys)}={text}")
    name = ",".join(said) or "base"
    if len(name.encode()) > BYTES:
        name = name.encode()[: BYTES - 9].decode(errors="ignore") + "~" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def _label(key: str, keys: Sequence[str]) -> str:
    """The shortest end of a key that no other key has."""
    parts = key.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((end for end in ends if not any(other != key and f".{other}".endswith(f".{end}") for other in keys)), key)


def _text(value: Any, among: Sequence[Any]) -> str:
    """A value as part of a file's name; `among` are all values of its key."""
    if isinstance(value, float):
        return _number(value, [float(other) for other in among if isinstance(other, int | float)])
    if isinstance(value, str) and "/" in value.strip("/"):
        last = [str(other).rstrip("/").rpartition("/")[2] for other in among]
        value = value.rstrip("/").rpartition("/")[2] if len(set(last)) == len({*map(str, among)}) else value
    if isinstance(value, list | tuple):
        return "+".join(_text(item, [item]) for item in value) or "empty"
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-.") or "empty"


def _number(value: float, among: Sequence[float]) -> str:
    """The shortest way to write a number, with as many digits as tell it apart from the others."""
    if not math.isfinite(value):
        return str(value)
    rounded = lambda x, digits: float(f"{x:.{digits}g}")  # noqa: E731
    digits = next((d for d in range(DIGITS, 17) if len({rounded(x, d) for x in among}) == len({*among})), 17)
    number = Decimal(repr(rounded(value, digits))).normalize()
    sign, figures, exponent = number.as_tuple()
    mantissa = "".join(map(str, figures[:1])) + ("." + "".join(map(str, figures[1:])) if figures[1:] else "")
    scientific = f"{'-' if sign else ''}{mantissa}e{len(figures) - 1 + int(exponent)}"
    return min(format(number, "f"), scientific, key=len)


def _identity(point: Point) -> str:
    return repr(sorted(configs.plain(point).items()))
