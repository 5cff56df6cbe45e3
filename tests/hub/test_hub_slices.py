"""Leaves of a checkpoint, read into their shards: the right values, each slice once, and little memory besides."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tuning.core import mesh
from tuning.hub import files, slices
from tuning.hub.names import Place, file_shape

L, E, D, F = 4, 8, 24, 16  # layers, experts, width, hidden
FSDP, TENSOR, BOTH = "fsdp", "tensor", ("fsdp", "tensor")  # of 4, 2 and 8 devices
SPECS = {  # shape and leading axes -> how the leaf may be split
    ((D,), ()): [(), (FSDP,)],
    ((D, F), ()): [(), (FSDP,), (FSDP, TENSOR), (TENSOR, FSDP), (None, BOTH)],
    ((L, D), (L,)): [(), (None, FSDP), (TENSOR,)],
    ((L, D, F), (L,)): [(), (None, FSDP), (None, FSDP, TENSOR), (None, TENSOR, FSDP), (None, None, BOTH), (FSDP, None, TENSOR)],
    ((1, D, F), (1,)): [(), (None, FSDP, TENSOR)],
    ((L, E, D, F), (L,)): [(), (None, FSDP, TENSOR)],  # the experts of a layer in one tensor
    ((L, E, D, F), (L, E)): [(), (None, FSDP), (None, FSDP, None, TENSOR), (None, BOTH), (TENSOR, FSDP), (None, None, BOTH)],
}
CASES = [(*kind, spec) for kind, specs in SPECS.items() for spec in specs]
MIB = 2**20


def checkpoint(directory, shape, lead, transposed, dtype):
    """(tensors, place, values of the leaf) of a checkpoint with one leaf and a tensor that is none of its."""
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    flat = values.reshape(-1, *shape[len(lead) :])
    held = {f"t{i}": np.ascontiguousarray(flat[i].T if transposed else flat[i]) for i in range(len(flat))} if lead else {}
    held = held or {"t0": np.ascontiguousarray(values.T if transposed else values)}
    files.write(directory, {**held, "other": np.ones(5, np.float32)}.items(), shard_bytes=4096)
    return files.Tensors(directory), Place(tuple(held), lead, transposed), values


def sharding(spec, count=8):
    return NamedSharding(mesh.over(jax.devices()[:count], fsdp=4 if count == 8 else 1, tensor=2 if count == 8 else 1), PartitionSpec(*spec))


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture(params=["filled on the devices", "put together on the host"])
def way(request, monkeypatch):
    if request.param.startswith("filled"):
        monkeypatch.setattr(slices, "SMALL_BYTES", 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "lead", "spec"), CASES)
def test_every_shard_holds_its_values_and_every_byte_is_read_once(shape, lead, spec, transposed, way, tmp_path, monkeypatch):
    tensors, place, values = checkpoint(tmp_path, shape, lead, transposed, np.float32)
    sizes, view = [], files.Tensors.view

    def spy(self, name, index=()):
        sizes.append(view(self, name, index).nbytes)
        return view(self, name, index)

    monkeypatch.setattr(files.Tensors, "view", spy)
    where = sharding(spec)
    leaf = slices.read(tensors, place, shape, where, np.float32)
    assert leaf.sharding == where and leaf.dtype == np.float32
    assert all(bits(shard.data) == bits(values[shard.index]) for shard in leaf.addressable_shards)
    assert sum(sizes) == values.nbytes
    assert max(sizes) <= math.prod(where.shard_shape(shape)[len(lead) :]) * 4


F64, F32, F16, BF16 = map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


@pytest.mark.parametrize(("shape", "lead", "spec"), [((L, D, F), (L,), (None, FSDP, TENSOR)), ((D, F), (), (FSDP,))])
@pytest.mark.parametrize("file", [F64, F32, F16, BF16])
@pytest.mark.parametrize("kept", [F32, F16, BF16])
def test_values_are_cast_as_numpy_casts_them(file, kept, shape, lead, spec, way, tmp_path):
    tensors, place, values = checkpoint(tmp_path, shape, lead, True, file)
    leaf = slices.read(tensors, place, shape, sharding(spec), kept)
    assert leaf.dtype == kept and bits(leaf) == bits(values.astype(kept))


def test_tensors_of_one_leaf_may_be_held_in_different_dtypes(way, tmp_path):
    held = {"a": np.full((D, F), 1.1, BF16), "b": np.full((D, F), 1.1, F32)}
    files.write(tmp_path, held.items())
    leaf = slices.read(files.Tensors(tmp_path), Place(("a", "b"), (2,), False), (2, D, F), sharding((None, FSDP)), F32)
    assert bits(leaf) == bits(np.stack([one.astype(F32) for one in held.values()]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("start", [109, 4096])  # where a device may not use the file's own memory, and where it may
def test_what_was_read_stays_when_the_file_changes(start, transposed, way, tmp_path):
    values, file = np.random.default_rng(0).normal(size=(16, 24)).astype(F32), tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": values.shape, "data_offsets": [0, values.nbytes]}}).encode().ljust(start - 8)
    file.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    expected = values.T if transposed else values
    leaf = slices.read(files.Tensors(tmp_path), Place(("a",), (), transposed), expected.shape, sharding((FSDP,)), F32)
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(values.nbytes))
    assert bits(leaf) == bits(expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tensor_of_another_shape_is_an_error_that_names_it(transposed, tmp_path):
    tensors, place, _ = checkpoint(tmp_path, (L, D, F), (L,), transposed, F32)
    with pytest.raises(ValueError, match=r"t0 has the shape .* in .*, and its leaf needs"):
        slices.read(tensors, place, (L, D, F - 1), sharding(()), F32)


def test_the_leaf_is_its_own_even_where_devices_shared_a_reading(tmp_path):
    tensors, place, values = checkpoint(tmp_path, (512, 2048), (), False, F32)
    leaf, other = (slices.read(tensors, place, (512, 2048), sharding((FSDP,)), F32) for _ in range(2))
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(leaf)
    assert bits(changed) == bits(values + 1) and bits(other) == bits(values)


def test_layers_share_one_program_and_so_do_leaves_of_one_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SMALL_BYTES", 0)
    tensors, place, _ = checkpoint(tmp_path, (L, D, F), (L,), False, BF16)
    where, compiled = sharding((None, FSDP)), []

    def note(event, *_, **__):
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        slices.read(tensors, place, (L, D, F), where, F32)
        assert len(compiled) == 2  # zeros, and what puts a layer in its place
        slices.read(tensors, place, (L, D, F), where, F32)
        assert len(compiled) == 2
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# (name, shape, leading axes, transposed, dtype in the file, dtype kept, how it is split); tensors grow from leaf to leaf
BIG = [
    ("experts", (8, 8, 512, 1024), (8, 8), True, BF16, F32, (None, TENSOR, FSDP)),
    ("narrow", (8, 1024, 1024), (8,), False, F32, BF16, (None, FSDP, TENSOR)),
    ("plain", (10, 1024, 2048), (10,), False, BF16, BF16, (None, FSDP, TENSOR)),
    ("wide", (10, 1024, 2048), (10,), True, F32, F32, (None, FSDP, TENSOR)),
    ("embed", (16384, 1024), (), False, BF16, F32, (TENSOR, FSDP)),
    ("head", (1024, 16384), (), True, F32, F32, (FSDP, TENSOR)),
]
ALLOWANCE = 12 * MIB  # for compiled programs; a stack has 40 MiB and more


def big(shrink):
    """(name, shape, place, the rest) of each leaf of BIG, its last two axes shrunk."""
    for name, shape, lead, transposed, *rest in BIG:
        place = Place(tuple(f"{name}.{i}" for i in range(math.prod(lead))), lead, transposed)
        yield name, (*shape[:-2], *(n // shrink for n in shape[-2:])), place, rest


@pytest.fixture(scope="module")
def big_checkpoints(tmp_path_factory):
    """A tiny and a big one; the i-th tensor of a leaf holds i + 1."""
    home = tmp_path_factory.mktemp("big")
    for shrink in (16, 1):
        leaves = ((place, file_shape(shape, place), rest[0]) for _, shape, place, rest in big(shrink))
        tensors = ((n, np.full(size, i + 1, dtype)) for place, size, dtype in leaves for i, n in enumerate(place.tensors))
        files.write(home / str(shrink), tensors, shard_bytes=64 * MIB)
    yield home
    shutil.rmtree(home)


def load_big(home, shrink, count):
    """Reads it, and yields a line for each leaf: when it began and ended, bytes of one tensor and of all leaves so far."""
    tensors, leaves, total = files.Tensors(home / str(shrink)), [], 0
    for name, shape, place, (_, kept, spec) in big(shrink):
        began = time.monotonic()
        leaves.append(slices.read(tensors, place, shape, sharding(spec, count), kept).block_until_ready())
        total += leaves[-1].nbytes
        one = tensors.view(place.tensors[0]).nbytes
        yield {"name": name, "began": began, "ended": time.monotonic(), "tensor": one, "total": total}
    for leaf, (name, _, place, _) in zip(leaves, big(shrink), strict=True):
        means = np.asarray(leaf.astype(np.float32).mean((-2, -1))).reshape(-1)
        assert np.array_equal(means, np.arange(len(place.tensors)) + 1), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory")
@pytest.mark.parametrize("count", [1, 8])
def test_reading_takes_no_more_memory_than_two_tensors_of_the_file(count, big_checkpoints):
    flags = f"--xla_force_host_platform_device_count={count}"
    # What is freed goes back to the system at once, so that what is in use is measured, and not what malloc keeps for later.
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, str(big_checkpoints), str(count)]
    samples = []  # (time, bytes of anonymous memory), taken from outside: no lock of the reader can hide a peak
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        while process.poll() is None:
            if found := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
                samples.append((time.monotonic(), int(found[1]) * 1024))
            time.sleep(0.002)
        lines = [json.loads(line) for line in process.stdout or ()]
    assert process.returncode == 0 and [line["name"] for line in lines] == [name for name, *_ in BIG]
    start = [memory for moment, memory in samples if moment < lines[0]["began"]][-1]
    assert max(memory for _, memory in samples) - start > 0.9 * lines[-1]["total"]  # the samples do see the arrays
    for line in lines:
        peak = max(memory for moment, memory in samples if line["began"] <= moment <= line["ended"])
        assert peak - start - line["total"] <= 2 * line["tensor"] + ALLOWANCE, line["name"]


if __name__ == "__main__":
    for _ in load_big(Path(sys.argv[1]), 16, int(sys.argv[2])):
        pass
    for line in load_big(Path(sys.argv[1]), 1, int(sys.argv[2])):
        print(json.dumps(line), flush=True)
