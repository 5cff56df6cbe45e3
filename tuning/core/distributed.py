"""Joining the processes of one run on several hosts: who is the first of them, how many there are, and which one this is.

jax finds that out by itself on TPU slices (VM metadata, GKE's variables), under Slurm and under MPI. Here is what it lacks.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

PORT = 8476  # of the first process, where nobody names one


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes; to be called before anything asks jax for devices.

    coordinator  HOST:PORT of process 0, with the number of processes and which one this is; None for what the environment says. Where that
                 says that there is no other, nothing is done
    """
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    found = given if coordinator else environment(os.environ, tpu=importlib.util.find_spec("libtpu") is not None)
    if found is None:
        return
    try:
        jax.distributed.initialize(**found)
    except ValueError as error:
        raise ValueError(
            f"This process does not know the others ({error}) It is on no TPU slice and in no job of Slurm, MPI or SkyPilot, or its "
            "variables are missing. Give each process --coordinator=HOST:PORT --processes=N --process=I."
        ) from None


def environment(env: Mapping[str, str], tpu: bool) -> dict[str, Any] | None:
    """What jax.distributed.initialize is told, which is nothing where jax knows better; None if there is but one process.

    SkyPilot numbers its nodes; the first address is that of node 0. On TPUs the numbers of the slice count, which jax reads.
    Under Slurm jax gives a process the one GPU that has its number, right for a process per GPU; the only process of a node has them all.
    """
    if "SKYPILOT_NODE_RANK" in env:
        hosts, rank = env["SKYPILOT_NODE_IPS"].split(), int(env["SKYPILOT_NODE_RANK"])
        if len(hosts) == 1:
            return None
        if not tpu:
            known = {"coordinator_address": f"{hosts[0]}:{PORT}", "num_processes": len(hosts), "process_id": rank}
            return {**known, "cluster_detection_method": "deactivate"}  # what jax finds out of Kubernetes below it is another matter
    alone = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if alone and (gpus := int(env.get("SLURM_GPUS_ON_NODE", 0))):
        return {"local_device_ids": list(range(gpus))}
    return {}
