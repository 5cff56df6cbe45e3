"""What accelerators are: arithmetic, memory, bandwidth and power of one device as JAX counts devices, each figure with its source.

A chip that is not here has no figures rather than another's: an unknown variant (a slice of a GPU, another board) is unknown.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device. All figures are of one JAX device; None where there is no source for one.

    name              as in --topology=NAME:SHAPE
    kinds             regular expression that the whole of `jax.Device.device_kind` matches
    peak_flops        FLOP/s of dense bfloat16 matmuls, without sparsity
    memory_bytes      what a program can have at most
    bandwidth         bytes/s between that memory and the cores
    devices_per_chip  how many JAX devices a chip of the topology is
    watts             most that the board draws, by its own limit; without host, network and cooling
    sources           {figure: where it is from}
    """

    name: str
    kinds: str
    peak_flops: float | None
    memory_bytes: int
    bandwidth: float | None
    devices_per_chip: int
    watts: float | None
    sources: Mapping[str, str]


TITAN = "pytorch/torchtitan, torchtitan/tools/utils.py, which cites the vendors' pages"
NANOCHAT = "karpathy/nanochat, get_peak_flops and get_peak_bandwidth"
BOOK = "jax-ml/scaling-book, tpus.md"
CLOUD = "Google Cloud documentation of TPU7x"
SHEET = "NVIDIA's data sheet"
COMPILER = "what the TPU compiler of jax 0.10.2 says is available when a program does not fit"
DRIVER = "what nvidia-smi prints for the board"

GOOGLE = {"peak_flops": TITAN, "memory_bytes": COMPILER, "bandwidth": CLOUD}
NVIDIA = {"peak_flops": TITAN, "memory_bytes": DRIVER, "bandwidth": NANOCHAT, "watts": DRIVER}
# Of two boards under one name, or two totals by two drivers, the smaller memory stands here, and the larger power.
TABLE = (
    Chip("v4", r"TPU v4", 275e12, 32 * GIB, 1.2e12, 1, 192.0,
         {"peak_flops": TITAN, "memory_bytes": BOOK, "bandwidth": BOOK, "watts": "Jouppi et al., 2023, arXiv:2304.01433: most measured"}),
    Chip("v5e", r"TPU v5 lite|TPU v5e", 197e12, int(15.75 * GIB), 0.81e12, 1, None,
         {"peak_flops": TITAN, "memory_bytes": COMPILER, "bandwidth": BOOK}),
    Chip("v5p", r"TPU v5|TPU v5p", 459e12, int(95.74 * GIB), 2.765e12, 1, None, GOOGLE),
    Chip("v6e", r"TPU v6 lite|TPU v6e", 918e12, int(31.25 * GIB), 1.638e12, 1, None, GOOGLE),
    Chip("tpu7x", r"TPU ?7x", 2307e12 / 2, int(94.75 * GIB), 7.38e12 / 2, 2, None, GOOGLE),
    Chip("h100", r"NVIDIA H100 80GB HBM3", 989e12, 81_559 * MIB, 3.35e12, 1, 700.0, NVIDIA),
    Chip("h100-pcie", r"NVIDIA H100 PCIe", 756e12, 81_559 * MIB, 2.0e12, 1, 350.0, NVIDIA | {"watts": SHEET}),
    Chip("h100-nvl", r"NVIDIA H100 NVL", 835e12, 95_830 * MIB, 3.9e12, 1, 400.0, NVIDIA),
    Chip("h200", r"NVIDIA H200", 989e12, int(139.8 * GIB), 4.8e12, 1, 700.0,
         NVIDIA | {"memory_bytes": "the capacity in PyTorch's out-of-memory messages; nvidia-smi prints 143,771 MiB"}),
    Chip("a100-40", r"NVIDIA A100-(SXM4|PCIE)-40GB", 312e12, 40_536 * MIB, 1.6e12, 1, 400.0, NVIDIA),
    Chip("a100-80", r"NVIDIA A100-(SXM4|PCIE)-80GB|NVIDIA A100 80GB PCIe", 312e12, 81_251 * MIB, 2.0e12, 1, 400.0, NVIDIA),
    Chip("l40s", r"NVIDIA L40S", 362e12, 46_068 * MIB, 0.864e12, 1, 350.0, NVIDIA),
    Chip("a6000", r"NVIDIA RTX A6000", 154.85e12, 49_140 * MIB, 0.768e12, 1, 300.0, NVIDIA | {"peak_flops": SHEET, "bandwidth": SHEET}),
    Chip("rtx4090", r"NVIDIA GeForce RTX 4090", 165.2e12, 24_564 * MIB, 1.01e12, 1, 450.0, NVIDIA | {"peak_flops": NANOCHAT}),
    Chip("rtx3090", r"NVIDIA GeForce RTX 3090", 71e12, 24_576 * MIB, 0.936e12, 1, 350.0, NVIDIA | {"peak_flops": NANOCHAT}),
    Chip("cpu", r"cpu", None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, 1, None,
         {"memory_bytes": "this machine"}),
)  # fmt: skip

CHIPS: dict[str, Chip] = {chip.name: chip for chip in TABLE}


def of(device_kind: str) -> Chip | None:
    """The chip that a jax.Device's `device_kind` names, or its name, which is the kind of an absent device; None if it is not known."""
    return CHIPS.get(device_kind) or next((chip for chip in CHIPS.values() if re.fullmatch(chip.kinds, device_kind)), None)
