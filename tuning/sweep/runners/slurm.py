"""Slurm: the workers are the tasks of one array job, on one node each or on several."""

from __future__ import annotations

import shlex
import sys

from tuning.sweep.runners import launch
from tuning.sweep.runners.runner import Job


def slurm(
    job: Job,
    *,
    partition: str = "",
    account: str = "",
    time: str = "",
    nodes: int = 1,
    gpus: str = "",
    cpus: int = 0,
    memory: str = "",
    options: str = "",
    setup: str = "",
    python: str = sys.executable,
    grace: int = 120,
    restarts: int = 50,
    template: str = "",
) -> int:
    """Hands an array job to sbatch. The sweep's directory and what its runs read lie on a file system that the nodes share.

    partition, account, time, memory  as sbatch has them (time=08:00:00, memory=64G); "" for the cluster's own
    nodes     of each worker; a run uses all of them
    gpus      of each node, as in 8 or a100:4
    cpus      of each node
    options   further ones of sbatch, as in "--qos=high --constraint=a100"
    setup     shell commands before the worker, as in "module load cuda"
    python    which has tuning installed, seen from the nodes
    grace     seconds before the time limit at which a worker saves its run and goes back to the queue
    restarts  how many times a task may be queued again
    template  a file in the place of launch/slurm.sh
    """
    words = shlex.split(options)
    if odd := [word for word in words if not word.startswith("-")]:
        raise ValueError(f"--runner.options: {odd[0]!r} is no option of sbatch. Write --key=value, with the equals sign.")
    if job.workers < 1 or nodes < 1:
        raise ValueError(f"{job.workers} workers of {nodes} nodes: there must be at least one of each.")
    flags = {"partition": partition, "account": account, "time": time, "gpus-per-node": gpus, "cpus-per-task": cpus, "mem": memory}
    file = job.directory / "launch" / "slurm.sh"
    values = {
        "name": launch.shell(job.directory.name),
        "last": str(job.workers - 1),
        "nodes": str(nodes),
        "log": launch.shell(str(job.log("slurm")).replace("%", "%%").removesuffix(".log") + "-%A-%a.log"),
        "grace": str(grace),
        "setup": setup,
        "srun": f"--cpus-per-task={cpus}" if cpus else "",  # srun does not take it over from sbatch
        "command": launch.shell(job.command(*(["--distributed"] if nodes > 1 else []), python=python)),
        "restarts": str(restarts),
    }
    command = ["sbatch", *(f"--{key}={value}" for key, value in flags.items() if value), *words, str(file)]
    return launch.submit(job, {file: launch.fill("slurm.sh", template, values)}, [command])
