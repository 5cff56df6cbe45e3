"""Stopping well: a signal asks the run to save and end after the step it is in; a second one ends it at once."""

from __future__ import annotations

import signal
import threading

import jax


class Interrupted(Exception):  # noqa: N818  (not an error: the run did as it was told)
    """The run was asked to stop and has saved. `code` is the exit status a shell expects: 128 + the signal's number."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"Stopped at step {step} by {signal.Signals(signum).name}; the state is saved, and the same command goes on from there."
        )
        self.code = 128 + signum


class Guard:
    """Catches SIGTERM and SIGINT while it is entered (in the main thread; elsewhere it does nothing)."""

    def __init__(self):
        self.signum: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Guard:
        # With several processes jax's own notifier catches SIGTERM, so that all of them agree on the step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}

    def _note(self, number: int, frame) -> None:
        self.signum = number
        self.__exit__()

    def stops(self, step: int) -> int | None:
        """The signal that asks to stop after this step, if there is one; all processes get the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self.signum
