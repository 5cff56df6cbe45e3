"""What a plan is for: so many devices of one kind, `v5e:16x16`, `h100:8`, or those that are here.

Of TPUs the text is that of the TPU compiler, chips in two or three dimensions, and `2*v5e:16x16` is two slices of them. Of GPUs and CPUs it
is a number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice

from tuning.core import chips, parts
from tuning.core import mesh as meshes
from tuning.core.chips import CHIPS, Chip
from tuning.plan import gpus

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` are JAX's, in all slices together; chip None is a device that nothing is known of."""

    name: str
    chip: Chip | None
    devices: int
    slices: int = 1

    @property
    def tpu(self) -> bool:
        return self.chip is not None and self.chip.name in TPUS

    @property
    def gpu(self) -> bool:
        return self.chip is not None and self.chip.name in gpus.GPUS

    @property
    def memory_bytes(self) -> int | None:
        """What one device can hold; None if that is not known."""
        return self.chip.memory_bytes if self.chip else None

    @property
    def absent(self) -> meshes.Absent:
        """Its devices as a mesh is made of them where nothing is compiled."""
        name = self.chip.name if self.chip else self.name
        platform = "tpu" if self.tpu else "cpu" if name == "cpu" else "gpu"
        return meshes.Absent(self.devices, AbstractDevice(name, None, platform))

    def targets(self) -> list[Any]:
        """The devices to compile for. ValueError, with the remedy, where there is no compiler for them on this machine."""
        if self.tpu:
            found = _absent_tpus(self.name.partition("*")[2] or self.name, self.slices)
            if len(found) != self.devices:  # v4, whose two cores JAX makes one device of
                raise ValueError(
                    f"--topology={self.name}: the TPU compiler describes it as {len(found)} devices, and it has {self.devices}: what it "
                    "made of a step would be another program. Leave out --compile."
                )
            return found
        if self.gpu:  # before jax looks for devices: compiling takes neither a driver nor CUDA's libraries
            os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        with quiet():
            here = jax.devices()
        if self.chip is not None and chips.of(here[0].device_kind) is self.chip and len(here) >= self.devices:
            return here[: self.devices]
        if self.gpu:
            return _absent_gpus(self.name.partition(":")[0], self.devices)
        raise ValueError(
            f"--topology={self.name}: to compile for CPUs takes {self.devices} of them, and here are {len(here)} of "
            f"{here[0].device_kind!r}. Compile where they are, or leave out --compile."
        )


def parse(text: str) -> Topology:
    """The topology that a text names. ValueError for one that is none."""
    found = re.fullmatch(r"(?:(\d+)\*)?([\w-]+)(?::([\dx]+))?", text)
    if found is None or found[2] not in CHIPS:
        word = found[2] if found else text
        raise ValueError(f"--topology={text}: {word!r} is not one of {', '.join(CHIPS)}.{parts.suggestion(word, CHIPS)} "
                         "Write v5e:16x16, 2*v5p:4x4x4 (two slices), h100:8 or cpu.")  # fmt: skip
    slices, chip, shape = int(found[1] or 1), CHIPS[found[2]], found[3] or ""
    sizes = [int(n) for n in shape.split("x") if n]
    if chip.name in TPUS and (len(sizes) not in (2, 3) or 0 in sizes):
        raise ValueError(f"--topology={text}: a slice of {chip.name} has two or three dimensions, such as {chip.name}:4x4.")
    if chip.name not in TPUS and (len(sizes) > 1 or 0 in sizes or slices > 1):
        raise ValueError(f"--topology={text}: {chip.name} is counted: {chip.name}:8.")
    return Topology(text, chip, slices * math.prod(sizes) * chip.devices_per_chip, slices)


def described(topology: Topology) -> str:
    """One line: how many devices of what, and how much memory each has."""
    room = topology.memory_bytes
    memory = f"{room / 2**30:,.1f} GiB each" if room else "of unknown memory"
    return f"{topology.name}: {topology.devices} device{'s' if topology.devices > 1 else ''}, {memory}"


def local() -> Topology:
    """The devices that are here."""
    devices = jax.devices()
    chip = chips.of(devices[0].device_kind)
    return Topology(f"{chip.name if chip else devices[0].device_kind}:{len(devices)}", chip, len(devices))


@functools.cache
def _absent_tpus(name: str, slices: int) -> list[Any]:
    """The devices of a pod that is not there, as the TPU compiler describes them."""
    from jax.experimental import topologies

    # The compiler is asked for a description alone: another process may do the same at the same time, and no metadata server is needed.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        with quiet():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
    except (RuntimeError, ModuleNotFoundError) as error:  # jax reports a missing libtpu as either
        if "libtpu" in str(error) or isinstance(error, ModuleNotFoundError):
            raise ValueError("The TPU compiler is not installed. It runs without a TPU: pip install 'tuning[tpu]' (700 MB).") from None
        raise ValueError(f"--topology={name}: the TPU compiler knows no such slice ({str(error).splitlines()[0]})") from None


@functools.cache
def _absent_gpus(name: str, count: int) -> list[Any]:
    """The GPUs of a host that is not there, as the compiler for them describes them."""
    try:
        with quiet():
            return gpus.absent(CHIPS[name], count)
    except NotImplementedError:
        raise ValueError(
            "The compiler for GPUs is not installed. It runs without a GPU: pip install 'tuning[cuda-compiler]' (400 MB), in an "
            "environment of its own."
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps from the user what compilers write to standard error (that their devices are not here); what fails is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
