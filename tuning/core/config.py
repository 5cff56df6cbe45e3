"""A run's config as a nested dict: sections, each a part with its keys, completed and checked before anything is built."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from tuning.core import parts
from tuning.core.parts import Part, Required

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """What may stand under one dotted key.

    table     the parts to choose from by `name`; a single part without a name has the key ""
    default   the name taken where none is given
    inherits  another section whose given keys count here too, except those named in `own`
    """

    table: Mapping[str, Part]
    default: str = ""
    inherits: str = ""
    own: tuple[str, ...] = ()


Sections = Mapping[str, Section]  # dotted key -> Section, outer before inner


def resolve(sections: Sections, given: Mapping[str, Any], scalars: Mapping[str, Any]) -> Config:
    """The whole config: what is given over what the parts default to. `scalars` are keys outside any section, with defaults.

    ValueError for an unknown key or part, with a suggestion.
    """
    tops = dict.fromkeys([key.split(".")[0] for key in sections] + list(scalars))
    _known(given, tops, "config")
    for parent in {key.rpartition(".")[0] for key in sections if "." in key} - set(sections):
        _known(dig(given, parent) or {}, [key.split(".")[-1] for key in sections if key.rpartition(".")[0] == parent], parent)
    full: Config = {}
    for where, section in sections.items():
        own = dict(dig(given, where) or {})
        wanted = (
            {**{k: v for k, v in (dig(given, section.inherits) or {}).items() if k not in section.own}, **own} if section.inherits else own
        )
        if section.inherits and "name" in own and own["name"] != (dig(given, section.inherits) or {}).get("name"):
            wanted = own
        children = [key.split(".")[-1] for key in sections if key.rpartition(".")[0] == where]
        put(full, where, _section(section, {k: v for k, v in wanted.items() if k not in children}, where))
    return {**full, **{key: given.get(key, default) for key, default in scalars.items()}}


def _section(section: Section, given: Mapping[str, Any], where: str) -> Config:
    if "" in section.table:
        return parts.complete(section.table[""], given, where)
    name = given.get("name") or section.default
    part = parts.pick(section.table, name, where)
    return {"name": name, **parts.complete(part, {k: v for k, v in given.items() if k != "name"}, where, also=("name",))}


def _known(given: Mapping[str, Any], known, where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"Unknown config key {where}.{key}.{parts.suggestion(key, known)} It takes: {', '.join(known)}.")


def bind(sections: Sections, config: Mapping[str, Any], where: str) -> Part:
    """The part that a section of a resolved config names, with its keys set."""
    settings = dig(config, where)
    table = sections[where].table
    return parts.bind(table[settings.get("name", "")], settings, where)


def kinds(sections: Sections, config: Mapping[str, Any]) -> dict[str, type]:
    """{dotted key: type of its values} for all keys of a resolved config that belong to a part."""
    found = {}
    for where, section in sections.items():
        part = section.table[dig(config, where).get("name", "")]
        found.update({f"{where}.{key}": parts.kind(part, key) for key in parts.schema(part)})
    return found


def dig(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key, or None."""
    value: Any = config
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def put(config: Config, dotted: str, value: Any) -> None:
    """Sets the value under a dotted key, making sections on the way."""
    *parents, last = dotted.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


def override(sections: Sections, config: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """The config with dotted keys changed. Changing the name of a section's part empties the section first."""
    changed = copy.deepcopy(dict(config))
    names = {f"{where}.name": where for where in sections}
    for key in sorted(changes, key=lambda key: (key not in names, key.count("."))):
        if key in names and (dig(changed, key) or sections[names[key]].default) != changes[key]:
            put(changed, names[key], {})
        put(changed, key, changes[key])
    return changed


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}, sections opened, values (tuples, mappings of a checkpoint) kept."""
    values = {}
    for key, value in config.items():
        values.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return values


def flags(changes: Mapping[str, Any]) -> list[str]:
    """Dotted keys with their values as flags of `tuning train`, for a shell."""
    as_text = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return [shlex.quote(f"--config.{key}={as_text(value)}") for key, value in changes.items()]


def plain(value: Any) -> Any:
    """The config as JSON holds it: tuples become lists, unset required keys null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, Required) else value


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any], free: tuple[str, ...]) -> str:
    """`key: a here, b there` for the first key that differs, keys under the prefixes in `free` not counted; "" if none does."""
    a, b = flat(plain(one)), flat(plain(other))
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key) and not any(key == f or key.startswith(f + ".") for f in free):
            return f"{key}: {a.get(key)!r} here, {b.get(key)!r} there"
    return ""
