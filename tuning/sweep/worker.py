"""A worker: takes runs from a sweep's directory and trains them, one after the other in its own process, until none waits."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import platform
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tuning import api, build
from tuning.core.config import Config
from tuning.sweep import states, sweep
from tuning.sweep.states import Claim
from tuning.training.guard import Interrupted
from tuning.training.progress import console

if TYPE_CHECKING:
    from tuning.sweep.trials import Trials

Heard = Callable[[str, int, dict[str, float]], None]  # run, step, measures


class Pruned(Exception):  # noqa: N818  (not an error: the run did as it was told)
    """Raised by who hears of an evaluation: the run is not worth going on with."""


def work(directory: Path, worker: str = "", heard: Heard | None = None) -> int:
    """Takes runs until none waits. Returns the exit status: 0, or 128 + n after signal n, with the run that was on saved and waiting.

    A run that raises is `failed`, its traceback in the output, and the next one is taken; it waits again while it has retries left, except
    where it would only fail in the same way (a mistake in the config, a loss that is not finite). Under jax.distributed the first process
    takes runs for all, and a run that raises ends the worker, since the others may be waiting for one another in the middle of it.

    heard  called after each evaluation; it may raise Pruned. Where the sweep is a search, that is heard instead
    """
    worker, first = worker or f"{platform.node()}-{os.getpid()}", jax.process_index() == 0
    searched = None
    if (directory / "search.json").is_file():
        from tuning.sweep import trials

        searched = trials.load(directory) if first else None
        heard = functools.partial(_judged, searched)
    with Stop() as stop:
        while not stop.signum:
            claim = (searched.take(worker) if searched else states.take(directory, sweep.load(directory).points, worker)) if first else None
            plan = sweep.load(directory)
            with contextlib.closing(claim) if claim else contextlib.nullcontext():
                name, config = _agreed((claim.name, sweep.run_config(directory, claim.name)) if claim else ("", {}))
                if not name:
                    console.print("No run waits.")
                    return 0
                console.print(f"\n{name}", markup=False)
                note, goes_on = _run(directory, name, config, plan.retries, stop, heard)
                if claim:
                    note(claim)
            if not goes_on:
                return 128 + stop.signum if stop.signum else 1
            jax.clear_caches()  # the next run's programs are its own
            gc.collect()
    return 128 + stop.signum


def _run(directory: Path, name: str, config: Config, retries: int, stop: Stop, heard: Heard | None) -> tuple[Callable[[Claim], None], bool]:
    """Trains a run. How its claim notes the end, and whether the worker may go on with another run."""
    last: dict[str, float] = {}

    def on_eval(step: int, measures: dict[str, float]) -> None:
        last.update(measures, step=step)
        if heard:
            heard(name, step, measures)

    path = directory / "runs" / name
    argv = ["tuning", "train", f"--config={directory / 'configs' / name}.json", f"--workdir={path}"]
    try:
        with stop.raising():
            final = api.train(config, path, argv=argv, on_eval=on_eval)
    except Pruned:
        return lambda claim: claim.pruned(last), True
    except (KeyboardInterrupt, Interrupted) as error:
        stop.signum = stop.signum or (error.code - 128 if isinstance(error, Interrupted) else signal.SIGINT)
        console.print(str(error) or f"Stopped by {signal.Signals(stop.signum).name}; the run goes on from its last checkpoint.")
        return lambda claim: claim.released(), False
    except Exception as error:
        console.print(traceback.format_exc(), markup=False)
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        again = 0 if isinstance(error, ValueError | FloatingPointError) else retries
        # A loss is the same number in all processes; other errors may be one process's own.
        return lambda claim: claim.failed(said, again), jax.process_count() == 1 or isinstance(error, FloatingPointError)
    return lambda claim: claim.done(final), True


class Stop:
    """SIGINT and SIGTERM while it is entered: noted and, while a run is on, raised as KeyboardInterrupt.

    The run's loop has its own guard, which saves first. A signal that comes to it too late, in its last step, is noted here all the same.
    """

    def __init__(self):
        self.signum, self._raises = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        # With several processes jax's own notifier catches SIGTERM, so that all of them agree on the step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)  # hears of every signal, whoever handles it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._fd)
            for end in self._pipe:
                os.close(end)

    def _note(self, number: int, frame: object) -> None:
        self.signum = number
        if self._raises:
            self._raises = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raising(self):
        """While a run is on."""
        try:
            self._raises = True
            if self.signum:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False
            if self._before:
                with contextlib.suppress(BlockingIOError):
                    heard = [number for number in os.read(self._pipe[0], 1024) if number in self._before]
                    self.signum = self.signum or (heard[-1] if heard else 0)


def _judged(searched: Trials | None, name: str, step: int, measures: dict[str, float]) -> None:
    """Raises Pruned in every process where the search, which the first one knows, has enough of the run."""
    ends = searched is not None and searched.heard(name, step, measures)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        ends = bool(multihost_utils.broadcast_one_to_all(np.int32(ends)))
    if ends:
        raise Pruned


def _agreed(chosen: tuple[str, Config]) -> tuple[str, Config]:
    """The first process's choice, in every process."""
    if jax.process_count() == 1:
        return chosen
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(chosen).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    found = multihost_utils.broadcast_one_to_all(text if jax.process_index() == 0 else np.zeros(size, np.uint8))
    name, config = json.loads(np.asarray(found, np.uint8).tobytes())
    return name, build.revived(config) if name else config
