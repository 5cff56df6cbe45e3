"""Who has which run of a sweep: how each run stands, and claims that no two workers can hold.

    DIR/states/NAME.json  how the run stands, replaced whole; only who holds its latest claim writes it
    DIR/claims/NAME.K     the K-th time that the run was taken, and by whom

A claim is made with O_EXCL, which one process alone can do, on this host or on any that shares the directory. None is ever removed, so
nobody can remove another's: a run whose worker died is taken by the next claim. The holder keeps the file locked (flock), which the kernel
ends with the process however it dies, and touches it every BEAT seconds. A claim is dead when its lock is free and it was made under this
kernel or, since locks of other hosts may not be visible here, was not touched for STALE seconds.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from tuning.training import workdir

WAITING, RUNNING, DONE, FAILED, PRUNED = STATES = ("waiting", "running", "done", "failed", "pruned")
BEAT, STALE = 15.0, 300.0  # seconds; clocks of hosts that share a directory differ by less than STALE
LIVES = 3


@dataclasses.dataclass(frozen=True)
class State:
    """How a run stands.

    state         one of STATES
    attempts      how many times it failed
    deaths        how many workers in a row died with it before anything further was saved
    saved         the step of its last checkpoint when it was taken, -1 for none
    worker        who has it, or had it last
    began, ended  seconds since 1970; began is when it was first taken
    error         why it failed, in one line
    final         its final measures, None for what is not finite
    """

    state: str = WAITING
    attempts: int = 0
    deaths: int = 0
    saved: int = -1
    worker: str = ""
    began: float | None = None
    ended: float | None = None
    error: str = ""
    final: dict[str, float | None] = dataclasses.field(default_factory=dict)


def read(directory: Path, name: str) -> State:
    """How a run stands by its file: `running` may be what a dead worker left behind."""
    try:
        return State(**json.loads((directory / "states" / f"{name}.json").read_text()))
    except FileNotFoundError:
        return State()


def survey(directory: Path, names: Iterable[str]) -> dict[str, State]:
    """How runs stand now: one that a dead worker had is waiting."""
    latest, found = _latest(directory), {}
    for name in names:
        state = read(directory, name)
        gone = state.state == RUNNING and (name not in latest or dead(_claim(directory, name, latest[name])))
        found[name] = dataclasses.replace(state, state=WAITING) if gone else state
    return found


class Claim:
    """A run that this process holds until it closes this, or dies."""

    def __init__(self, directory: Path, name: str, number: int, file: IO[str]):
        self.directory, self.name, self._number, self._file = directory, name, number, file
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def write(self, **changes: Any) -> State:
        """Changes how the run stands, and returns it."""
        state = dataclasses.replace(read(self.directory, self.name), **changes)
        (self.directory / "states").mkdir(exist_ok=True)
        workdir.write_json(self.directory / "states" / f"{self.name}.json", dataclasses.asdict(state))
        return state

    def done(self, final: Mapping[str, float]) -> None:
        self.write(state=DONE, ended=time.time(), error="", final=_finite(final))

    def pruned(self, final: Mapping[str, float]) -> None:
        self.write(state=PRUNED, ended=time.time(), final=_finite(final))

    def failed(self, error: str, retries: int) -> None:
        """The run waits again if it may fail once more, `retries` times in all."""
        attempts = read(self.directory, self.name).attempts + 1
        self.write(state=WAITING if attempts <= retries else FAILED, ended=time.time(), attempts=attempts, error=error)

    def released(self) -> None:
        self.write(state=WAITING)

    def close(self) -> None:
        self._closed.set()
        self._file.close()

    def _beat(self) -> None:
        path = _claim(self.directory, self.name, self._number)
        while not self._closed.wait(BEAT):
            try:
                os.utime(path)
                lost = _claim(self.directory, self.name, self._number + 1).exists()
            except OSError:
                continue  # the file system is away for a while; whoever else sees it decides
            if lost and not self._closed.is_set():
                # This host stood still for so long that its worker was taken for dead. Whatever this process saved now would harm the
                # one that has the run instead.
                sys.stderr.write(f"tuning: another worker has taken {self.name} over; this one ends.\n")
                sys.stderr.flush()
                os._exit(1)


def take(directory: Path, names: Iterable[str], worker: str) -> Claim | None:
    """The next run that waits, as this worker's; None if none does. What failed before comes after the others."""
    latest = _latest(directory)
    states = {name: read(directory, name) for name in names}
    for name in sorted(states, key=lambda name: states[name].attempts):
        if states[name].state not in (WAITING, RUNNING):
            continue
        number = latest.get(name, 0)
        if number and not dead(_claim(directory, name, number)):
            continue
        if (claim := _make(directory, name, number + 1, worker)) is None:
            continue
        # Only now is what the file says the last word: who wrote it does not hold the run any more.
        state = read(directory, name)
        if state.state in (WAITING, RUNNING) and _begin(claim, state, worker):
            return claim
        claim.close()
    return None


def _begin(claim: Claim, state: State, worker: str) -> bool:
    """Whether the run goes on: not if it has killed too many workers at one place."""
    saved, deaths = last_saved(claim.directory / "runs" / claim.name), 0
    if state.state == RUNNING:
        deaths = 0 if saved > state.saved else state.deaths + 1
    if deaths >= LIVES:
        error = f"{deaths} workers died with it, one after the other, before anything further was saved; the last was {state.worker}."
        claim.write(state=FAILED, deaths=deaths, ended=time.time(), error=error)
        return False
    claim.write(state=RUNNING, deaths=deaths, saved=saved, worker=worker, began=state.began or time.time(), ended=None)
    return True


def taken(directory: Path, worker: str) -> int:
    """How many times this worker has taken a run."""
    made = [path.read_text() for path in (directory / "claims").glob("*")]
    return sum(json.loads(by)["worker"] == worker for by in made if by)


def again(directory: Path, names: Iterable[str]) -> list[str]:
    """Lets the failed ones of these runs wait again, with all their retries; returns their names."""
    latest, found = _latest(directory), []
    for name in names:
        if read(directory, name).state == FAILED and (claim := _make(directory, name, latest.get(name, 0) + 1, "")):
            claim.write(state=WAITING, attempts=0, deaths=0)
            claim.close()
            found.append(name)
    return found


def dead(claim: Path) -> bool:
    """Whether nobody holds a claim any more."""
    with claim.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask at once do not take each other for the holder
        except BlockingIOError:
            return False
        by = file.read()
        here = bool(by) and json.loads(by)["kernel"] == kernel()  # one without content is being made
        return here or time.time() - os.fstat(file.fileno()).st_mtime > STALE


def last_saved(run: Path) -> int:
    """The step of the last whole checkpoint in a run's directory; -1 if there is none."""
    steps = (run / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in steps if path.name.isdigit()), default=-1)


def kernel() -> str:
    """Names the running kernel: containers on one host share it and its locks, and host names may repeat."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _claim(directory: Path, name: str, number: int) -> Path:
    return directory / "claims" / f"{name}.{number}"


def _latest(directory: Path) -> dict[str, int]:
    """{run: number of its latest claim}."""
    found: dict[str, int] = {}
    for path in (directory / "claims").glob("*"):
        name, _, number = path.name.rpartition(".")
        found[name] = max(found.get(name, 0), int(number))
    return found


def _make(directory: Path, name: str, number: int, worker: str) -> Claim | None:
    """The claim of this number, if nobody else has made it."""
    path = _claim(directory, name, number)
    path.parent.mkdir(exist_ok=True)
    try:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644), "r+")
    except FileExistsError:
        return None
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps({"worker": worker, "kernel": kernel(), "host": platform.node(), "process": os.getpid()}))
    file.flush()
    return Claim(directory, name, number, file)


def _finite(measures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in measures.items()}
