"""The real train step, compiled ahead of time for devices that need not be here; what it takes, or that it does not fit.

Compilers do not say how long a program takes, and count loops once: of a compiled step only memory and exchanges are read.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from tuning import build
from tuning.core import mesh as meshes
from tuning.data import loader
from tuning.plan import hlo, topology
from tuning.training import state, step

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step; bytes are those of one device.

    hbm_bytes    of its main memory that the program takes while it runs, by the compiler's own account; of a finished program for TPUs jax
                 says it, without gaps between buffers (1 % or so) and with what lies on the chip (128 MiB or less)
    seconds      that compiling took
    collectives  {kind: {"count", "bytes"}} of one step
    largest      (bytes, type, what it is) of its largest buffers
    text         of the program, as XLA prints it; executable, the program itself
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    hbm_bytes: int
    seconds: float
    collectives: dict[str, dict[str, int]]
    largest: list[tuple[int, str, str]]
    text: str = dataclasses.field(repr=False)
    executable: Any = dataclasses.field(repr=False)

    @property
    def peak_bytes(self) -> int:
        """The same from the sums that jax gives. Of a TPU's program its temporaries hold more than lies in main memory: up to half as
        much again was seen."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


@dataclasses.dataclass(frozen=True)
class Refused:
    """A step that the compiler found no room for: bytes that it needs and that there are, where it says so, and what it says."""

    needed_bytes: int | None
    available_bytes: int | None
    seconds: float
    message: str


def lower(parts: build.Parts) -> Any:
    """The run's train step, not compiled yet, on the devices of its mesh."""
    m = parts.model
    start = state.abstract(m.layout, m.tuned, parts.optimizer.transform, m.mesh)
    batch = loader.abstract(parts.train, parts.settings.batch_size, m.mesh)
    with jax.set_mesh(m.mesh):
        return step.lower(parts.train_step(parts.config["seed"]), start, batch)


def compile(parts: build.Parts) -> Compiled | Refused:
    """The run's train step for the devices of its mesh. Compiled anew: no cache of programs is asked, so that the seconds are true."""
    lowered, began = lower(parts), time.monotonic()
    try:
        with topology.quiet():
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return refused(str(error), time.monotonic() - began)
    seconds, memory, text = time.monotonic() - began, executable.memory_analysis(), executable.as_text()
    program = hlo.Program(text)
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    on_tpu = meshes.device(parts.model.mesh).platform == "tpu"
    return Compiled(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes if on_tpu else whole, seconds, hlo.totals(program.collectives()), program.largest(), text, executable,
    )  # fmt: skip


def refused(message: str, seconds: float) -> Refused:
    """From what it says: `... temporaries (90.19G) exceeds available HBM (15.75G)`, or `Used 20.33G of 15.75G hbm`."""
    amounts = [float(n) * UNITS[unit] for n, unit in re.findall(r"\b([\d.]+)([KMGT])(?:i?B)?\b", message)]
    needed, available = (int(x) for x in amounts[:2]) if len(amounts) > 1 else (None, None)
    return Refused(needed, available, seconds, message.partition("\n\n")[0].strip()[:2000])
