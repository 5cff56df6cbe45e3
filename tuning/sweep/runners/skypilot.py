"""SkyPilot: each worker is a managed job on one of many clouds, Kubernetes or Slurm."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from tuning.sweep.runners import launch
from tuning.sweep.runners.runner import Job


def skypilot(
    job: Job,
    *,
    accelerators: str,
    volume: str = "",
    bucket: str = "",
    nodes: int = 1,
    spot: bool = False,
    options: str = "",
    name: str = "",
    mount: str = "/sweeps",
    setup: str = "",
    python: str = "python",
    restarts: int = 20,
    template: str = "",
) -> int:
    """Hands one managed job per worker to `sky jobs launch`, with this repository as its working directory.

    The sweep's sweep.json and configs/ are copied along; what the workers write is in the volume or the bucket. What the runs read must be
    found there too, or be ids of the hub.

    accelerators  of each node, as in H100:8 or tpu-v5litepod-16
    volume        a SkyPilot volume that many nodes may write (`sky volumes`)
    bucket        in its place, an address as in gs://NAME/FOLDER, for one worker of one node: a bucket cannot say who took a run first
    nodes         of each worker; a run uses all of them. A TPU slice is one node, of whatever size
    options       further ones of `sky jobs launch`, as in "--infra=gcp/us-central1"
    name          of the jobs, to which -0, -1, ... is added; "" for the directory's
    mount         where the volume or the bucket is mounted; the sweep is in a folder of its name there
    setup         shell commands on each node, in the repository, before the worker; "" installs tuning
    restarts      how many times a worker that failed is started again; preempted ones are in any case
    template      a file in the place of launch/skypilot.yaml
    """
    tpu = accelerators.lower().startswith("tpu")
    if tpu and nodes != 1:
        raise ValueError(f"--runner.nodes={nodes} with --runner.accelerators={accelerators}: a worker is one slice. Set nodes=1.")
    there = replace(job, directory=launch.elsewhere(job, f"{mount.rstrip('/')}/{job.directory.name}"))
    enter = setup or f"source launch/environment.sh {'tpu' if tpu else 'cuda'}"
    values = {
        "nodes": nodes,
        "accelerators": accelerators,
        "spot": spot,
        "restarts": restarts,
        "repository": str(launch.ROOT),
        "setup": enter,
    }
    storage = _storage(job, nodes, mount, volume, bucket)
    texts, commands = {}, []
    for number in range(job.workers):
        worker = f"{launch.name(job, name)}-{number}"
        file = job.directory / "launch" / f"{worker}.yaml"
        words = there.command(f"--worker={worker}", *(["--distributed"] if tpu or nodes > 1 else []), python=python)
        folder = launch.shell(there.directory)
        run = f"{enter} && mkdir -p {folder} && rsync --recursive --update ~/sweep/ {folder}/ && {launch.shell(words)}"
        filled = {key: json.dumps(value) for key, value in {**values, "name": worker, "run": run}.items()}
        texts[file] = launch.fill("skypilot.yaml", template, {**filled, "storage": storage})
        commands.append(["sky", "jobs", "launch", "--yes", "--detach-run", *shlex.split(options), str(file)])
    return launch.submit(job, texts, commands)


def _storage(job: Job, nodes: int, mount: str, volume: str, bucket: str) -> str:
    """The lines of a task that say what is copied to its nodes and mounted there."""
    if bool(volume) == bool(bucket):
        raise ValueError("The runner skypilot needs --runner.volume=NAME, or --runner.bucket=ADDRESS for a single worker of one node.")
    if bucket and (job.workers, nodes) != (1, 1):
        raise ValueError(
            f"--runner.bucket={bucket} serves one worker of one node, not {job.workers} of {nodes}. Take --runner.volume, or one."
        )
    files = {f"~/sweep/{part}": str(job.directory / part) for part in ("sweep.json", "configs")}
    found = {"file_mounts": {**files, **({mount: {"source": bucket, "mode": "MOUNT_CACHED"}} if bucket else {})}}
    found |= {"volumes": {mount: volume}} if volume else {}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in found.items())
