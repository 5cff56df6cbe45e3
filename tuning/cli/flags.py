"""--config=FILE.py[:arg] and --config.a.b=value, in the syntax of ml_collections' config flags."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from tuning import build
from tuning.core import config as configs
from tuning.core import parts
from tuning.core.config import Config


def split(argv: list[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """(value of --config, {dotted key: text of its override}, all other arguments)."""
    path, overrides, rest = None, {}, []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config" and not flag.startswith("--config."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if flag == "--config":
            path = value
        else:
            overrides[flag.removeprefix("--config.")] = value
    return path, overrides, rest


def read(path: str) -> Config:
    """get_config(arg) of a config file, `FILE.py` or `FILE.py:arg`; or what FILE.json holds, as a run's config.json does."""
    name, colon, arg = path.partition(":")
    file = Path(name)
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in file.parent.glob("*.py")))
        raise ValueError(f"--config={path}: no such file. {file.parent} has {there or 'no configs'}.")
    if file.suffix == ".json":
        return build.revived(json.loads(file.read_text()))
    get_config = function(file, "get_config", "returns a ConfigDict")
    config = get_config(arg) if colon else get_config()
    return config.to_dict()


def function(file: Path, name: str, does: str) -> Callable[..., Any]:
    """The function of this name in a Python file."""
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{file} has no function {name}() that {does}.")
    return getattr(module, name)


def merge(config: Mapping[str, Any], overrides: Mapping[str, str]) -> Config:
    """The config with the overrides, each parsed as the type of the key it changes.

    A section whose `name` is overridden starts from the defaults of the part it then names.
    """
    sections = build.SECTIONS
    names = {key: value for key, value in overrides.items() if key.endswith(".name")}
    full = build.resolve(configs.override(sections, config, names))
    kinds, values = configs.kinds(sections, full), configs.flat(full)
    for key in overrides:
        if key not in values:
            raise ValueError(f"Unknown config key {key}.{hint(key, values)}")
    typed = {}
    for key, value in values.items():
        unset = value is None or isinstance(value, parts.Required)
        configs.put(typed, key, config_dict.placeholder(kinds.get(key, str)) if unset else value)
    parsed = _parse(typed, ["tuning"] + [f"--config.{key}={value}" for key, value in overrides.items()])
    return configs.override(sections, config, {key: configs.dig(parsed, key) for key in overrides})


def _parse(typed: Config, argv: list[str]) -> Config:
    """The config with the overrides in argv, by ml_collections; ValueError for a value of another type than its key's."""
    holder = flags.FlagValues()
    before, sys.argv = sys.argv, argv  # where ml_collections looks for overrides when a config is defined
    try:
        defined = config_flags.DEFINE_config_dict("config", ConfigDict(typed), flag_values=holder, lock_config=False)
        holder(argv)
    except (flags.Error, TypeError) as error:
        raise ValueError(f"--config: {error}") from None
    finally:
        sys.argv = before
    return defined.value.to_dict()


def hint(key: str, known: Mapping[str, Any]) -> str:
    """A suggestion for a key that does not exist, and what its section has."""
    section, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    there = f" {section} has: {', '.join(siblings)}." if siblings else ""
    return (parts.suggestion(last, siblings) or parts.suggestion(key, known)) + there
