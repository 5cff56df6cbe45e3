"""Cloud TPU VMs: each worker is all hosts of one slice, which is asked for as a queued resource."""

from __future__ import annotations

import shlex
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuning.sweep.runners import launch
from tuning.sweep.runners.runner import Job

# The hosts' image for JAX, by what a type begins with (docs.cloud.google.com/tpu/docs/runtimes).
VERSIONS = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    **dict.fromkeys(("v4", "v3", "v2"), "tpu-ubuntu2204-base"),
}


def tpu_vm(
    job: Job,
    *,
    type: str,
    zone: str,
    project: str,
    version: str = "",
    options: str = "",
    name: str = "",
    repository: str = str(launch.ROOT),
    directory: str = "",
    setup: str = "source launch/environment.sh tpu",
    python: str = "python",
    restarts: int = 20,
    poll: int = 30,
    template: str = "",
) -> int:
    """Asks for one slice per worker, waits until it is granted, runs the worker on all of its hosts, and gives it back.

    This process stays until all are done; after Ctrl-C the runs are saved and the slices given back first. The sweep's directory and what
    its runs read lie in a folder that the hosts share.

    type        of the slices, as in v5litepod-16
    version     of the hosts' image; "" for the one that JAX needs on this type
    options     further ones of `gcloud compute tpus queued-resources create`, as in "--spot --network=mine"
    name        of the slices, to which -0, -1, ... is added; "" for the directory's
    repository  where the hosts have this repository
    directory   where the hosts see the sweep's directory; "" for where it is here
    setup       shell commands on each host, in the repository, before the worker
    restarts    how many times a worker that ended early, or whose slice was taken away, is started again
    poll        seconds between looks at the queue
    template    a file in the place of launch/tpu_vm.sh
    """
    kind = type.split("-")[0]
    if not version and kind not in VERSIONS:
        raise ValueError(
            f"--runner.type={type}: known are {', '.join(VERSIONS)}. For another, name the hosts' image: --runner.version=IMAGE."
        )
    there = replace(job, directory=launch.elsewhere(job, directory))
    common = {"type": type, "zone": zone, "project": project, "version": version or VERSIONS[kind], "options": shlex.split(options)}
    common |= {"restarts": restarts, "poll": poll}
    files: dict[str, Path] = {}
    texts: dict[Path, str] = {}
    for number in range(job.workers):
        worker = f"{launch.name(job, name)}-{number}"
        files[worker] = job.directory / "launch" / f"{worker}.sh"
        words = launch.shell(there.command(f"--worker={worker}", "--distributed", python=python))
        # gcloud starts the command again where the connection was lost; the lock lets the worker that is still there finish first.
        lock, log = f'"${{TMPDIR:-/tmp}}"/{worker}.lock', f'{launch.shell(there.log(worker).with_suffix(""))}-"$(hostname)".log'
        started = f"cd {launch.shell(repository)} && {setup or 'true'} && exec flock --no-fork {lock} {words} >>{log} 2>&1"
        mine = launch.shell(f"[-]-worker={worker}( |$)")  # does not match the command line that it stands in
        values = {**common, "name": worker, "command": started, "stop": f"pkill -f -- {mine}; while pgrep -f -- {mine}; do sleep 1; done"}
        texts[files[worker]] = launch.fill("tpu_vm.sh", template, {key: launch.shell(value) for key, value in values.items()})
    commands = {worker: ["bash", str(file)] for worker, file in files.items()}
    return _together(job, commands) if launch.ready(job, texts, list(commands.values()), "gcloud") else 0


def _together(job: Job, commands: Mapping[str, list[str]]) -> int:
    """Executes all at once and waits for them, also after a signal, which they get as SIGTERM. The worst exit status, or 128 + n."""
    running: dict[str, subprocess.Popen] = {}
    heard: list[int] = []

    def tell(number: int, frame: Any) -> None:
        heard.append(number)
        for process in running.values():
            process.terminate()

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for worker, command in commands.items():
            job.say(f"$ {shlex.join(command)}  (output to {job.log(worker)})")
            with job.log(worker).open("a") as log:
                if not heard:
                    running[worker] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        for worker, process in running.items():
            job.say(f"{worker} ended with exit status {process.wait()}.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + heard[0] if heard else max(process.returncode for process in running.values())
