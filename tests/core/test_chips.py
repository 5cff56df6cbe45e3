"""The table of accelerators: every figure has a source, every kind of device is one chip, and the figures are the published ones."""

import dataclasses
import math

import jax
import pytest

from tuning.core import chips
from tuning.core.chips import CHIPS, GIB

KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80", "NVIDIA L40S": "l40s", "NVIDIA RTX A6000": "a6000", "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090": "rtx3090", "cpu": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_device_is_one_chip(kind):
    assert [chip.name for chip in CHIPS.values() if chip is chips.of(kind)] == [KINDS[kind]]


def test_every_chip_is_some_kind_of_device():
    assert set(KINDS.values()) == set(CHIPS)


@pytest.mark.parametrize(
    "kind", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H200 NVL", "TPU v5 lite x", "CPU"]
)
def test_a_relative_of_a_chip_is_not_that_chip(kind):
    assert chips.of(kind) is None


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_a_source_and_what_has_none_is_none(name):
    chip = CHIPS[name]
    figures = {"peak_flops", "memory_bytes", "bandwidth", "watts"}
    assert {figure for figure in figures if getattr(chip, figure) is not None} == set(chip.sources)
    assert all(math.isfinite(getattr(chip, figure)) and getattr(chip, figure) > 0 and chip.sources[figure] for figure in chip.sources)


def test_a_chip_of_two_devices_has_half_of_the_published_figures_in_each():
    chip = CHIPS["tpu7x"]
    assert chip.devices_per_chip == 2
    assert chip.devices_per_chip * chip.peak_flops == 2307e12
    assert 0.98 * 192 * GIB < chip.devices_per_chip * chip.memory_bytes < 192 * GIB  # less what the compiler keeps
    assert chip.devices_per_chip * chip.bandwidth == 7.38e12


@pytest.mark.parametrize(
    "name, sold, least",
    [("h100", 80, 79.6), ("h200", 141, 139), ("a100-40", 40, 39.5), ("a100-80", 80, 79.3), ("l40s", 48, 44.9), ("a6000", 48, 47.9)],
)  # fmt: skip
def test_memory_is_what_the_device_offers(name, sold, least):
    """All in GiB: vendors mean that by a GB of a board, of which a part is not the program's."""
    assert least * GIB <= CHIPS[name].memory_bytes <= sold * GIB


def test_this_machine_is_a_cpu_without_a_peak():
    chip = chips.of(jax.devices("cpu")[0].device_kind)
    assert chip is CHIPS["cpu"] and chip.peak_flops is None
    assert 0.25 * GIB < chip.memory_bytes < 2**50


def test_a_chip_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHIPS["v4"].watts = 1.0
