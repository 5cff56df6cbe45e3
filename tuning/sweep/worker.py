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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tuning import api, build
from tuning.core.config import Config
from tuning.sweep import states, sweep, vectorized
from tuning.sweep.states import Claim
from tuning.training.guard import Interrupted
from tuning.training.many import Outcome
from tuning.training.progress import console

if TYPE_CHECKING:
    from tuning.sweep.trials import Trials

Heard = Callable[[str, int, dict[str, float]], None]  # run, step, measures


class Pruned(Exception):  # noqa: N818  (not an error: the run did as it was told)
    """Raised by who hears of an evaluation: the run is not worth going on with."""


def work(directory: Path, worker: str = "", heard: Heard | None = None) -> int:
    """Takes runs until none waits. Returns the exit status: 0, or 128 + n after signal n, with the run that was on saved and waiting.

    Where the plan says so, runs that can be one program are taken and trained together; one that failed before is trained alone. A run that
    raises is `failed`, its traceback in the output, and the next one is taken; it waits again while it has retries left, except
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
            with contextlib.ExitStack() as held:
                claims = [held.enter_context(contextlib.closing(one)) for one in _with_like(directory, plan, claim, worker, bool(searched))]
                runs = _agreed({claim.name: sweep.run_config(directory, claim.name) for claim in claims})
                if not runs:
                    console.print("No run waits.")
                    return 0
                console.print("\n" + "\n".join(runs), markup=False)
                notes, goes_on = _run(directory, runs, plan.retries, stop, heard)
                for claim in claims:
                    notes[claim.name](claim)
            if not goes_on:
                return 128 + stop.signum if stop.signum else 1
            jax.clear_caches()  # the next run's programs are its own
            gc.collect()
    return 128 + stop.signum


def _with_like(directory: Path, plan: sweep.Plan, claim: Claim | None, worker: str, alone: bool) -> list[Claim]:
    """The claim, if any, with those of the waiting runs that can be one program with it."""
    if claim is None or alone or plan.vectorize < 2 or jax.process_count() > 1 or states.read(directory, claim.name).attempts:
        return [claim] if claim else []
    names = list(plan.points)
    dealt = vectorized.groups([sweep.run_config(directory, name) for name in names], plan.vectorize)
    own = next(group for group in dealt if names.index(claim.name) in group.runs)
    like = [names[i] for i in own.runs if names[i] != claim.name and not states.read(directory, names[i]).attempts]
    return [claim, *filter(None, (states.take(directory, [name], worker) for name in like))]


def _run(
    directory: Path, runs: Mapping[str, Config], retries: int, stop: Stop, heard: Heard | None
) -> tuple[dict[str, Callable[[Claim], Any]], bool]:
    """Trains a run, or several as one program. How the claim of each notes its end, and whether the worker may go on with others."""
    last: dict[str, dict[str, float]] = {name: {} for name in runs}

    def hears(name: str) -> api.OnEval:
        def on_eval(step: int, measures: dict[str, float]) -> None:
            last[name].update(measures, step=step)
            if heard:
                heard(name, step, measures)

        return on_eval

    paths = [directory / "runs" / name for name in runs]
    argv = ["tuning", "work", str(directory)]
    outcomes: list[Outcome]
    try:
        with stop.raising():
            if len(runs) == 1:
                ((name, config),) = runs.items()
                argv = ["tuning", "train", f"--config={directory / 'configs' / name}.json", f"--workdir={paths[0]}"]
                outcomes = [api.train(config, paths[0], argv=argv, on_eval=hears(name))]
            else:
                outcomes = vectorized.train_many(list(runs.values()), paths, argv=argv, on_eval=[*map(hears, runs)])
    except (KeyboardInterrupt, Interrupted) as error:
        stop.signum = stop.signum or (error.code - 128 if isinstance(error, Interrupted) else signal.SIGINT)
        console.print(str(error) or f"Stopped by {signal.Signals(stop.signum).name}; the run goes on from its last checkpoint.")
        return dict.fromkeys(runs, Claim.released), False
    except Exception as error:
        outcomes = [error] * len(runs)
    # A loss is the same number in all processes; other errors may be one process's own.
    ours = [error for error in outcomes if isinstance(error, Exception) and not isinstance(error, Pruned | FloatingPointError)]
    ended = {name: _noted(outcome, last[name], retries) for name, outcome in zip(runs, outcomes, strict=True)}
    return ended, jax.process_count() == 1 or not ours


def _noted(outcome: Outcome, last: dict[str, float], retries: int) -> Callable[[Claim], Any]:
    """How a claim notes that its run ended so; `last` is what was heard of it last."""
    if isinstance(outcome, dict):
        return lambda claim: claim.done(outcome)
    if isinstance(outcome, Pruned):
        return lambda claim: claim.pruned(last)
    console.print("".join(traceback.format_exception(outcome)), markup=False)
    said = f"{type(outcome).__name__}: {outcome}".splitlines()[0]
    return lambda claim: claim.failed(said, 0 if isinstance(outcome, ValueError | FloatingPointError) else retries)


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


def _agreed(chosen: dict[str, Config]) -> dict[str, Config]:
    """The first process's choice, in every process."""
    if jax.process_count() == 1:
        return chosen
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(chosen).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    found = multihost_utils.broadcast_one_to_all(text if jax.process_index() == 0 else np.zeros(size, np.uint8))
    return {name: build.revived(config) for name, config in json.loads(np.asarray(found, np.uint8).tobytes()).items()}
