"""Google Kubernetes Engine: each worker is all hosts of one TPU slice, as a JobSet."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace

from tuning.sweep.runners import launch
from tuning.sweep.runners.runner import Job


def gke(
    job: Job,
    *,
    image: str,
    claim: str,
    accelerator: str,
    topology: str,
    chips: int = 4,
    mount: str = "/sweeps",
    directory: str = "",
    options: str = "",
    name: str = "",
    python: str = "python",
    grace: int = 120,
    restarts: int = 50,
    template: str = "",
) -> int:
    """Hands one JobSet per worker to kubectl (https://jobset.sigs.k8s.io, which the cluster must have).

    image        a container's, in which tuning[tpu] is installed
    claim        a PersistentVolumeClaim that many nodes may write (Filestore); it holds the sweep's directory and what its runs read
    accelerator  the node pool's label gke-tpu-accelerator, as in tpu-v5-lite-podslice
    topology     of a slice, as in 4x4
    chips        of each host
    mount        where the claim is mounted
    directory    where the containers see the sweep's directory; "" for the folder of its name under `mount`
    options      of kubectl, as in "--namespace=mine"
    name         of the JobSets, to which -0, -1, ... is added; "" for the directory's
    python       which has tuning installed, in the image
    grace        seconds that a preempted host has for saving
    restarts     how many times a worker is started again
    template     a file in the place of launch/gke.yaml
    """
    if not re.fullmatch(r"\d+(x\d+)+", topology) or (count := math.prod(map(int, topology.split("x")))) % chips:
        raise ValueError(
            f"--runner.topology={topology} must be chips by chips, as in 4x4, and a whole number of hosts with --runner.chips={chips}."
        )
    there = launch.elsewhere(job, directory or f"{mount.rstrip('/')}/{job.directory.name}")
    if not there.is_relative_to(mount):
        raise ValueError(f"--runner.directory={there} must lie in --runner.mount={mount}, where the claim is.")
    hosts = count // chips
    values = {
        # The hosts of one slice are one node pool; a slice of one host is one node among others.
        "domain": "cloud.google.com/gke-nodepool" if hosts > 1 else "kubernetes.io/hostname",
        "hosts": hosts, "chips": chips, "grace": grace, "restarts": restarts,
        "image": image, "claim": claim, "accelerator": accelerator, "topology": topology, "mount": mount,
    }  # fmt: skip
    texts, commands = {}, []
    for number in range(job.workers):
        worker = f"{launch.name(job, name)}-{number}"
        file = job.directory / "launch" / f"{worker}.yaml"
        words = replace(job, directory=there).command(f"--worker={worker}", *(["--distributed"] if hosts > 1 else []), python=python)
        mine = {"name": worker, "command": [word.replace("$(", "$$(") for word in words]}  # $(NAME) would be a variable
        texts[file] = launch.fill("gke.yaml", template, {key: json.dumps(value) for key, value in {**values, **mine}.items()})
        # `create`, not `apply`: of a JobSet that is there and done, apply would start nothing and say so to nobody.
        commands.append(["kubectl", *shlex.split(options), "create", f"--filename={file}"])
    return launch.submit(job, texts, commands)
