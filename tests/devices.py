"""How tests see the CPU: as several devices, with tiny programs compiled quickly."""


def environment(count: int = 8) -> dict[str, str]:
    """The environment variables of a process with `count` devices; to be set before jax is imported."""
    flags = (
        f"--xla_force_host_platform_device_count={count}",
        # Tiny programs are compiled more often than run: no effort on their machine code takes a third of the time of compiling.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
        # The devices share few cores: where one waits long for the others, that is no deadlock.
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    )
    # XLA lets a device go on to another collective while a thread of its waits in one. With its own choice, one thread for each device,
    # all of them may come to wait for one another (about one short run in thirty did).
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PJRT_NPROC": str(8 * count)}
