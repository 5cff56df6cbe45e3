"""The local runner: k workers at a time on k parts of this host's devices, watched until no run waits.

A part is some CPU cores (by affinity), some GPUs (CUDA_VISIBLE_DEVICES) or some TPU chips (TPU_VISIBLE_CHIPS and what goes with it). Each
worker is a session of its own, so that Ctrl-C reaches it once, through here: it saves, and its run waits for the same command. Where this
process is killed, the workers go on by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import platform as host
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.sweep import states, sweep
from tuning.sweep.board import Board
from tuning.sweep.runners.runner import Job

PLATFORMS = ("cpu", "cuda", "tpu")
# Chips of a host stand in rows of two: {chips of a worker: their shape}.
CHIPS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
PORT = 8476
POLL = 1.0  # seconds
LIVES = 3


@dataclasses.dataclass(frozen=True)
class Place:
    """What one worker has: ids of cores, GPUs or chips, and the environment variables that confine it to them."""

    platform: str
    ids: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        return f"{'cores' if self.platform == 'cpu' else self.platform} {','.join(self.ids)}"


def local(job: Job, *, platform: str = "", devices: str = "") -> int:
    """`workers` workers on this host, each on its share of the devices; 0 if all runs are done, 1 if some failed.

    platform  cpu, cuda or tpu; "" for what jax would take
    devices   which of them, `0,1;2,3` for two workers on two each; "" shares out all that are there. A GPU may stand in several groups
    """
    found = places(job.workers, platform, devices, os.environ)
    if job.dry_run:
        for number, place in enumerate(found):
            words = [*(f"{key}={shlex.quote(value)}" for key, value in place.environment.items()), shlex.join(_command(job, number))]
            job.say(f"on {place}, output to {job.log(_name(number))}:\n  {' '.join(words)}")
        return 0
    workers = [Worker(job, number, place) for number, place in enumerate(found)]
    with _Signals() as signals, Board(job.directory, job.say) as board:
        while _turn(job, workers, board, signals.signum):
            if signals.fresh():
                for worker in workers:
                    worker.signal(signals.signum)
            time.sleep(POLL)
    left = [state.state for state in states.survey(job.directory, sweep.load(job.directory).points).values()]
    if signals.signum:
        job.say(f"Stopped. {left.count(states.WAITING)} of {len(left)} runs wait; the same command goes on with them.")
        return 128 + signals.signum
    if failed := left.count(states.FAILED):
        again = "" if (job.directory / "search.json").is_file() else ", and --retry_failed tries them again"
        job.say(f"{failed} of {len(left)} runs failed; {job.directory / 'states'} says why{again}.")
    return 1 if failed or states.WAITING in left else 0


def _turn(job: Job, workers: Sequence[Worker], board: Board, signum: int) -> bool:
    """Looks at everything once and starts what should run; whether anything is left to look at."""
    plan = sweep.load(job.directory)
    standing = states.survey(job.directory, plan.points)
    board.show(standing)
    having = {state.worker for state in standing.values() if state.state == states.RUNNING}
    alive = [worker for worker in workers if worker.alive()]
    if signum:
        return bool(alive)
    waiting = plan.more + sum(state.state == states.WAITING for state in standing.values())
    wanted = waiting - sum(worker.name not in having for worker in alive)  # those that have no run yet are about to take one
    for worker in workers:
        if wanted > 0 and worker not in alive and worker.deaths < LIVES:
            worker.start()
            alive.append(worker)
            wanted -= 1
    return bool(alive)


class Worker:
    """A worker's process, which may be started again and again in its place."""

    def __init__(self, job: Job, number: int, place: Place):
        self.name, self.deaths = _name(number), 0
        self._job, self._number, self._place, self._taken = job, number, place, 0
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        log = self._job.log(self.name)
        log.parent.mkdir(exist_ok=True)
        self._taken = states.taken(self._job.directory, self.name)
        with log.open("a") as output, _on(self._place):
            self._process = subprocess.Popen(
                _command(self._job, self._number), env={**os.environ, **self._place.environment},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def alive(self) -> bool:
        """Whether it works. A death counts where no run was taken before it: how often a run may kill its worker is the run's own count."""
        if self._process is None or (code := self._process.poll()) is None:
            return self._process is not None
        self._process = None
        if code:
            self.deaths = 0 if states.taken(self._job.directory, self.name) > self._taken else self.deaths + 1
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._job.say(f"Worker {self.name} ended with {how}; its output is in {self._job.log(self.name)}.")
        return False

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def _name(number: int) -> str:
    """With the host's: others may have the same directory."""
    return f"{host.node()}-{number}"


def _command(job: Job, number: int) -> list[str]:
    return job.command(f"--worker={_name(number)}")


@contextlib.contextmanager
def _on(place: Place):
    """What is started inside has the place's cores: a process inherits those of the thread that starts it."""
    if place.platform != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, map(int, place.ids))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Signals:
    """SIGINT, SIGTERM and SIGHUP are noted, to be passed on; SIGHUP (the terminal is gone) as SIGTERM."""

    def __init__(self):
        self.signum, self._fresh = 0, False

    def __enter__(self) -> _Signals:
        self._before: dict[int, Any] = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.signum, self._fresh = signal.SIGTERM if number == signal.SIGHUP else number, True

    def fresh(self) -> bool:
        """Whether one came since this was asked last."""
        fresh, self._fresh = self._fresh, False
        return fresh


def places(workers: int, platform: str, devices: str, environment: Mapping[str, str]) -> list[Place]:
    """A place for each worker. ValueError if there are fewer devices than workers, or others than were named."""
    kind = platform or _platform(environment)
    if kind not in PLATFORMS:
        raise ValueError(f"The local runner shares out {', '.join(PLATFORMS)}, not {kind!r}. Set --runner.platform to one of them.")
    there = present(kind, environment)
    if devices:
        groups = [tuple(part.strip() for part in group.split(",")) for group in devices.split(";")]
    elif workers > len(there):
        raise ValueError(
            f"--workers={workers}, and there are {len(there)} {'CPU cores' if kind == 'cpu' else f'{kind} devices'}: {','.join(there)}. "
            "Lower it, or say with --runner.devices=0;0 who shares them."
        )
    else:
        cuts = [len(there) * i // workers for i in range(workers + 1)]
        groups = [tuple(there[a:b]) for a, b in itertools.pairwise(cuts)]
    if len(groups) != workers:
        raise ValueError(f"--runner.devices={devices} are {len(groups)} groups, and --workers={workers}. Give a group for each worker.")
    if wrong := [name for group in groups for name in group if name not in there]:
        raise ValueError(f"--runner.devices={devices}: there is no {kind} device {wrong[0]!r}; there are {','.join(there)}.")
    shared = max(sum(name in group for group in groups) for name in there)
    return [Place(kind, group, _confined(kind, group, i, shared, platform, environment)) for i, group in enumerate(groups)]


def _confined(kind: str, ids: tuple[str, ...], number: int, shared: int, asked: str, environment: Mapping[str, str]) -> dict[str, str]:
    if kind == "cpu":
        return {"JAX_PLATFORMS": "cpu"} if asked else {}
    if kind == "cuda":
        # jax takes three quarters of a GPU's memory when it starts; where workers share one, each takes its part of that.
        part = {} if shared == 1 or "XLA_CLIENT_MEM_FRACTION" in environment else {"XLA_CLIENT_MEM_FRACTION": f"{0.9 / shared:.3f}"}
        return {"CUDA_VISIBLE_DEVICES": ",".join(ids), **part}
    if shared > 1 or len(ids) not in CHIPS:
        raise ValueError(f"A worker has {', '.join(map(str, CHIPS))} TPU chips of its own, not {','.join(ids)}. Set --runner.devices.")
    # Each worker is a slice of its own, of one process.
    return {
        "TPU_VISIBLE_CHIPS": ",".join(ids), "TPU_CHIPS_PER_PROCESS_BOUNDS": CHIPS[len(ids)], "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_ADDRESSES": f"localhost:{PORT + number}", "TPU_PROCESS_PORT": str(PORT + number), "CLOUD_TPU_TASK_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip


def _platform(environment: Mapping[str, str]) -> str:
    """What jax would take, found without starting it: that would take the devices from the workers."""
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return "cuda" if asked == "gpu" else asked
    installed = {
        "tpu": importlib.util.find_spec("libtpu"),
        "cuda": next((spec for version in (12, 13) if (spec := importlib.util.find_spec(f"jax_cuda{version}_plugin"))), None),
    }
    return next((kind for kind, spec in installed.items() if spec and present(kind, environment)), "cpu")


def present(kind: str, environment: Mapping[str, str]) -> list[str]:
    """The ids of this host's devices that this process may use."""
    if kind == "cpu":
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return [str(core) for core in sorted(cores)]
    visible = environment.get("CUDA_VISIBLE_DEVICES" if kind == "cuda" else "TPU_VISIBLE_CHIPS")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    patterns = ("/dev/nvidia[0-9]*",) if kind == "cuda" else ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
    files = next((found for pattern in patterns if (found := glob.glob(pattern))), [])
    return [str(number) for number in range(len(files))]
