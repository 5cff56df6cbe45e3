"""Topologies by name."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tuning.core import chips
from tuning.plan import gpus, topology


@pytest.mark.parametrize(
    "text, devices, slices, gib",
    [
        ("v5e:16x16", 256, 1, 15.75),
        ("v5p:4x4x4", 64, 1, 95.74),
        ("tpu7x:4x4x4", 128, 1, 94.75),
        ("2*v5e:4x4", 32, 2, 15.75),
        ("h100:8", 8, 1, 79.65),
    ],
)
def test_a_name_says_how_many_devices_there_are(text, devices, slices, gib):
    found = topology.parse(text)
    assert (found.devices, found.slices) == (devices, slices)
    assert found.memory_bytes / 2**30 == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize(
    "text, rule",
    [
        ("v5:4x4", "'v5' is not one of .* Did you mean v5"),
        ("v5e", "two or three dimensions, such as v5e:4x4"),
        ("v5e:16", "two or three dimensions"),
        ("h100:2x4", "h100 is counted: h100:8"),
        ("2*h100:8", "h100 is counted"),
        ("", "is not one of"),
    ],
)
def test_what_is_no_topology_is_said_with_the_rule(text, rule):
    with pytest.raises(ValueError, match=rule):
        topology.parse(text)


def test_what_cannot_be_compiled_for_is_said_with_the_remedy():
    with pytest.raises(ValueError, match=r"takes 9 of them, and here are 8 of 'cpu'. Compile where they are, or leave out --compile"):
        topology.parse("cpu:9").targets()
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        with pytest.raises(ValueError, match=r"The compiler for GPUs is not installed. .* pip install 'tuning\[cuda-compiler\]'"):
            topology.parse("h100:8").targets()


@pytest.mark.parametrize("chip", [chip for chip in chips.TABLE if chip.kinds.startswith("NVIDIA")], ids=lambda chip: chip.name)
def test_every_gpu_is_described_to_the_compiler(chip):
    assert chips.of(gpus.GPUS[chip.name].kind) is chip
    assert f"device_memory_size: {chip.memory_bytes} " in gpus.described(chip)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs pip install 'tuning[cuda-compiler]' (400 MB)")
def test_a_step_is_compiled_for_gpus_that_are_not_here(home):
    """In a process of its own: this one's devices are known already."""
    flags = [
        f"--config.model.path={home / 'model'}",
        "--config.train.batch_size=4",
        "--config.data.train.length=64",
        "--config.mesh.fsdp=2",
    ]
    command = [sys.executable, "-m", "tuning", "plan", "--config=configs/lora.py", "--topology=a100-40:2", "--compile", "--json", *flags]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert plan["compiled"]["peak_bytes"] > 0 and plan["compiled"]["collectives"]["all-gather"]["count"] > 0


def test_the_devices_that_are_here_need_no_name():
    here = topology.local()
    assert (here.name, here.devices) == ("cpu:8", 8) and here.memory_bytes > 2**30
    assert len(here.targets()) == 8
