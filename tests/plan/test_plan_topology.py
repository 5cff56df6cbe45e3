"""Topologies by name."""

import pytest

from tuning.plan import topology


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


def test_to_compile_for_a_gpu_takes_the_gpu():
    with pytest.raises(ValueError, match=r"takes 8 of them, and here are 8 of 'cpu'. Compile where they are, or leave out --compile"):
        topology.parse("h100:8").targets()


def test_the_devices_that_are_here_need_no_name():
    here = topology.local()
    assert (here.name, here.devices) == ("cpu:8", 8) and here.memory_bytes > 2**30
    assert len(here.targets()) == 8
