"""Processes of one run find one another: what each environment says, and what is said where it says nothing."""

import pytest

from tests import runs
from tuning.core import distributed

NODES = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "2"}
NAMED = {"coordinator_address": "10.0.0.1:8476", "num_processes": 3, "process_id": 2, "cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
    "env, tpu, found",
    [
        ({}, False, {}),
        (NODES, False, NAMED),
        (NODES, True, {}),  # the hosts of a slice have numbers of their own
        ({**NODES, "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0"}, False, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"}, False, {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, False, {"local_device_ids": [0, 1]}),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_ON_NODE": "8"}, False, {}),  # a process per GPU: jax gives each its own
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, False, {}),
    ],
)
def test_the_environment_says_who_the_others_are(env, tpu, found):
    assert distributed.environment(env, tpu) == found


def test_a_process_that_cannot_know_the_others_says_so(tmp_path):
    process = runs.start("work", str(tmp_path), "--distributed", SLURM_JOB_ID="1")  # not all that a step of Slurm has
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Give each process --coordinator=HOST:PORT" in out
