"""GPUs that are not here, as XLA must be told of them to compile for them.

Cores, cache and clock are from NVIDIA's data sheets, limits of a core from the CUDA C++ Programming Guide ("Technical Specifications per
Compute Capability").
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tuning.core.chips import Chip

KIB, MIB = 2**10, 2**20


class Gpu(NamedTuple):
    """kind: as jax.Device.device_kind says it; cores: streaming multiprocessors; cache: MiB of the second level; clock: GHz, at most."""

    kind: str
    capability: str
    cores: int
    cache: int
    clock: float


class Core(NamedTuple):
    """What a core has: threads at most, float32 units, KiB of shared memory, and how many of them one block may take."""

    threads: int
    units: int
    shared: int
    block: int


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 50, 1.98),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", "9.0", 114, 50, 1.755),
    "h100-nvl": Gpu("NVIDIA H100 NVL", "9.0", 132, 50, 1.785),
    "h200": Gpu("NVIDIA H200", "9.0", 132, 50, 1.98),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 108, 40, 1.41),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 40, 1.41),
    "l40s": Gpu("NVIDIA L40S", "8.9", 142, 96, 2.52),
    "a6000": Gpu("NVIDIA RTX A6000", "8.6", 84, 6, 1.8),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 72, 2.52),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", "8.6", 82, 6, 1.695),
}
CORES = {
    "8.0": Core(2048, 64, 164, 163),
    "8.6": Core(1536, 128, 100, 99),
    "8.9": Core(1536, 128, 100, 99),
    "9.0": Core(2048, 128, 228, 227),
}


def absent(chip: Chip, count: int) -> list[Any]:
    """`count` GPUs of one host, as the compiler of jax's CUDA plugin describes them. NotImplementedError where that is not installed."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="cuda", target_config=described(chip), topology=f"1x1x{count}")
    return list(found.devices)


def described(chip: Chip) -> str:
    """A `stream_executor.GpuTargetConfigProto` as text."""
    gpu = GPUS[chip.name]
    major, _, minor = gpu.capability.partition(".")
    core = CORES[gpu.capability]
    return f"""
        platform_name: "CUDA" device_description_str: "{gpu.kind}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
            name: "{gpu.kind}" cuda_compute_capability {{ major: {major} minor: {minor} }}
            device_memory_size: {chip.memory_bytes} memory_bandwidth: {int(chip.bandwidth or 0)}
            core_count: {gpu.cores} l2_cache_size: {gpu.cache * MIB} clock_rate_ghz: {gpu.clock}
            threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {core.threads} fpus_per_core: {core.units}
            shared_memory_per_core: {core.shared * KIB}
            shared_memory_per_block: {48 * KIB} shared_memory_per_block_optin: {core.block * KIB}
            registers_per_block_limit: 65536 registers_per_core_limit: 65536
            thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            dnn_version: "9.10.0" runtime_version: "12.8.0" driver_version: "13.0.0"
        }}
    """
