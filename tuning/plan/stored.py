"""A compiled train step in a file: made where a plan is made, used when the run starts.

The file is a pickle, as jax stores programs: who can write it runs code in the process that reads it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from tuning import build
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.plan.compile import Compiled

# Keys that change nothing in the step.
FREE = ("eval", "checkpoint", "log", "data.eval", "data.kept", "data.train.format", "model.revision", "model.adapter", "train.log_every")
FREE += tuple(f"data.train.{key}" for key in build.READ)


def save(path: Path, parts: build.Parts, compiled: Compiled) -> None:
    """Writes the step of a run. ValueError where this jax cannot store such a program."""
    try:
        program = serialize_executable.serialize(compiled.executable)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"The compiled step cannot be stored: jax {jax.__version__} does not serialise it ({error}).") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"facts": _facts(parts), "config": configs.plain(parts.config), "program": program}))


def load(path: Path, parts: build.Parts) -> Callable[..., Any]:
    """The step of a run, not compiled anew. ValueError if it is another run's, another jax's, or for other devices."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file. `tuning plan --compile --save={path}` writes it.")
    stored = pickle.loads(path.read_bytes())
    for name, here in _facts(parts).items():
        if stored["facts"].get(name) != here:
            raise ValueError(f"{path} was compiled with {name} {stored['facts'].get(name)!r}, and here it is {here!r}. Compile it anew.")
    if difference := configs.first_difference(parts.config, stored["config"], FREE):
        raise ValueError(f"{path} is the step of another run: {difference}. Compile it anew, or leave it out.")
    return serialize_executable.deserialize_and_load(*stored["program"], execution_devices=list(parts.model.mesh.devices.flat))


def _facts(parts: build.Parts) -> dict[str, Any]:
    where = parts.model.mesh
    return {"jax": jax.__version__, "device": meshes.device(where).device_kind, "mesh": dict(where.shape)}
