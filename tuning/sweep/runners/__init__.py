"""Who starts the workers of a sweep. To add a runner: write its file and add its line here."""

from tuning.sweep.runners.gke import gke
from tuning.sweep.runners.local import local
from tuning.sweep.runners.runner import Runner
from tuning.sweep.runners.skypilot import skypilot
from tuning.sweep.runners.slurm import slurm
from tuning.sweep.runners.tpu_vm import tpu_vm

RUNNERS: dict[str, Runner] = {"local": local, "slurm": slurm, "tpu_vm": tpu_vm, "gke": gke, "skypilot": skypilot}
