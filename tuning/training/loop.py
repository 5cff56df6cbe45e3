"""The one training loop: step, log, evaluate, save, until the steps are made.

What is logged at a step is that step's own value, never a mean over steps since the last line: so a run that was stopped at any step and
started again writes the same lines as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import numpy as np

from tuning.core.types import Batch, Mean, Means, TrainState
from tuning.training.checkpoint import Checkpoints
from tuning.training.guard import Guard, Interrupted
from tuning.training.progress import Display
from tuning.training.writer import Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """config.train.

    steps       updates in all
    batch_size  sequences per update, over all devices and microbatches
    accumulate  microbatches that an update is made of; it divides batch_size
    clip_norm   largest global norm of the tuned leaves' gradient; 0 for no clipping
    log_every   steps between lines in metrics.jsonl
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    clip_norm: float = 1.0
    log_every: int = 10

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.accumulate:
            raise ValueError(f"train.accumulate={self.accumulate} must divide train.batch_size={self.batch_size}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """config.eval.

    every       steps between evaluations on data.eval and data.kept; the start and the end are always evaluated. 0 for those two only
    batch_size  sequences at a time; 0 takes that of a training microbatch
    patience    evaluations without a better loss after which the run stops; 0 never stops early
    prompts     texts that are continued greedily at every evaluation, for TensorBoard
    max_new_tokens  of each continuation
    """

    every: int = 0
    batch_size: int = 0
    patience: int = 0
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """config.checkpoint.

    every      steps between checkpoints, besides those at evaluations and at the end. 0 for those only
    keep_last  how many of the latest are kept
    keep_best  whether the one with the lowest evaluation loss is kept too
    """

    every: int = 0
    keep_last: int = 1
    keep_best: bool = True


class Data(Protocol):
    """An endless loader whose place is a few numbers."""

    def __iter__(self) -> Generator[Batch]: ...
    def position(self) -> dict: ...


@dataclasses.dataclass
class Job:
    """All that the loop needs, as values and functions.

    step            compiled train step
    learning_rate   step -> float
    evaluate        state -> {measure: value}, with eval/loss among them; or None without evaluation data
    sample          state -> text for TensorBoard, or None
    on_eval         hears of each evaluation once it is saved: the step, and every measure as it was last; it may end the run by raising
    flops_per_token, peak_flops   of the model and of all devices together; without a known peak no MFU is reported
    sharing         runs that share the program: a line's times are those of all of them, and it says how many they are
    """

    step: Callable[[TrainState, Batch], tuple[TrainState, Means]]
    data: Data
    train: Train
    eval: Eval
    checkpoint: Checkpoint
    learning_rate: Callable[[int], float]
    checkpoints: Checkpoints
    writer: Writer
    display: Display
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    sample: Callable[[TrainState], str] | None = None
    on_eval: Callable[[int, dict[str, float]], None] | None = None
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    sharing: int = 1

    @property
    def shared(self) -> dict[str, float]:
        return {"time/runs_sharing": self.sharing} if self.sharing > 1 else {}


def run(job: Job, state: TrainState, memory: dict[str, Any] | None = None) -> tuple[TrainState, dict[str, float]]:
    """Trains from state.step to train.steps; returns the last state and the final values of all measures.

    `memory` is what the checkpoint noted of earlier evaluations (best loss, patience used up, losses before the first step). Raises
    Interrupted after a signal, FloatingPointError where a step's loss or gradient was not finite; in both cases nothing that was saved is
    harmed.
    """
    with Guard() as guard, job.display:
        course = steps(job, state, memory, guard.stops)
        while True:
            try:
                next(course)
            except StopIteration as done:
                return done.value


def steps(
    job: Job, state: TrainState, memory: dict[str, Any] | None, stops: Callable[[int], int | None]
) -> Generator[None, None, tuple[TrainState, dict[str, float]]]:
    """`run` as a generator, so that several runs can go on in turns. `stops` is as the guard has it.

    It pauses wherever a time begins or ends: what the first of several runs has made for all of them takes each the same time.
    """
    memory = {"best": None, "worse": 0, "before": {}, **(memory or {})}
    first, last = int(state.step), job.train.steps
    final: dict[str, float] = {}
    clock = Clock(job, first)
    if first == 0:
        began = time.monotonic()
        yield
        final |= _evaluate(job, state, 0, memory, began)
        _tell(job, 0, final)
    elif first >= last and job.evaluate:
        job.display.say(f"All {last} steps are made; raise train.steps to go on.")
        final |= job.evaluate(state)
        _tell(job, first, final)
    step = first
    with contextlib.closing(iter(job.data)) as batches:
        for step in range(first + 1, last + 1):
            yield
            clock.skip()
            yield
            state, means = job.step(state, next(batches))
            clock.tick(step, means)
            job.display.advance(step)
            evaluates = step == last or (job.eval.every > 0 and step % job.eval.every == 0)
            saves = evaluates or (job.checkpoint.every > 0 and step % job.checkpoint.every == 0)
            if step % job.train.log_every == 0 or step == last:
                values = clock.read()
                job.writer.write(step, values)
                job.display.note(step, values)
                final |= values
            began = time.monotonic()
            yield
            if evaluates and job.evaluate:
                clock.check()
                final |= _evaluate(job, state, step, memory, began)
            yield
            early = bool(job.eval.patience and memory["worse"] >= job.eval.patience)
            signum = stops(step)
            if saves or early or signum:
                clock.check()
                metric = final.get("eval/loss") if evaluates else None
                job.checkpoints.save(step, state.tuned, state.optimizer, {"data": job.data.position(), "memory": memory}, metric)
            if signum:
                job.checkpoints.wait()
                raise Interrupted(signum, step)
            if evaluates:
                _tell(job, step, final)
            if early:
                job.display.say(
                    f"Stopped early at step {step}: {memory['worse']} evaluations without a better loss than {memory['best']:.4f}."
                )
                break
    job.checkpoints.wait()
    return state, {"step": step, **final, **_looked_back(job, final, memory)}


def _looked_back(job: Job, final: dict[str, float], memory: dict[str, Any]) -> dict[str, float]:
    """The best loss and those before the first step, said beside the final ones."""
    for name, before in memory["before"].items():
        if name.endswith("/loss"):
            job.display.say(f"{name.replace('/', ' ')} {before:.4f} before, {final[name]:.4f} after")
    best = {} if memory["best"] is None else {"best/eval/loss": memory["best"]}
    return best | {f"before/{name}": before for name, before in memory["before"].items()}


def _tell(job: Job, step: int, measures: dict[str, float]) -> None:
    if job.evaluate and job.on_eval:
        job.on_eval(step, dict(measures))


def _evaluate(job: Job, state: TrainState, step: int, memory: dict[str, Any], began: float) -> dict[str, float]:
    """The measures, written with the seconds since `began`."""
    if job.evaluate is None:
        return {}
    values = job.evaluate(state)
    if step == 0:
        memory["before"] = {name: x for name, x in values.items() if name.endswith(("/loss", "/nll")) and math.isfinite(x)}
    better = math.isfinite(values["eval/loss"]) and (memory["best"] is None or values["eval/loss"] < memory["best"])
    memory.update(best=values["eval/loss"] if better else memory["best"], worse=0 if better else memory["worse"] + 1)
    job.writer.write(step, values | {"time/eval_seconds": time.monotonic() - began} | job.shared)
    if job.sample:
        job.writer.text(step, "samples", job.sample(state))
    shown = f"eval loss {values['eval/loss']:.4f}, perplexity {values['eval/perplexity']:.2f}, accuracy {values['eval/accuracy']:.1%}"
    shown += f", f1 {values['eval/f1']:.3f}" if "eval/f1" in values else ""
    shown += f"; kept loss {values['kept/loss']:.4f}" if "kept/loss" in values else ""
    job.display.say(f"step {step}: {shown}")
    return values


class Clock:
    """Collects what the steps since the last line left on the devices, and turns it into numbers: one transfer per line."""

    def __init__(self, job: Job, step: int):
        self._job, self._step, self._recent = job, step, []
        self._began = time.monotonic()

    def tick(self, step: int, means: Means) -> None:
        self._step = step
        self._recent.append((step, means))

    def skip(self) -> None:
        """Leaves what happened since the last tick (an evaluation, a save) out of the time per step."""
        if not self._recent:
            self._began = time.monotonic()

    def check(self) -> None:
        """FloatingPointError if a step since the last check had a loss or gradient that is not finite."""
        for step, means in self._recent:
            if not np.asarray(means["finite"].total):
                loss = float(means["loss"].value)
                raise FloatingPointError(
                    f"Step {step}: the loss ({loss}) or its gradient is not finite. The run stops; its last checkpoint is from before. "
                    "Lower optimizer.learning_rate, set train.clip_norm, or look at that step's data."
                )

    def read(self) -> dict[str, float]:
        """The last step's measures, and speed since the last line."""
        self.check()
        host: list[Any] = jax.device_get([dict(means) for _, means in self._recent])
        seconds = (time.monotonic() - self._began) / len(host)
        tokens = sum(float(means["tokens"].total) for means in host) / len(host)
        self._recent, self._began = [], time.monotonic()
        measures: dict[str, Mean] = {name: mean for name, mean in host[-1].items() if name != "finite"}
        job = self._job
        values = {f"train/{name}": float(mean.value) for name, mean in measures.items()}
        values["train/learning_rate"] = float(job.learning_rate(self._step - 1))
        values["time/seconds_per_step"] = seconds
        values["time/tokens_per_second"] = tokens / seconds
        values["time/seconds_left"] = seconds * (job.train.steps - self._step)
        values |= job.shared
        if job.peak_flops:
            values["time/mfu"] = job.flops_per_token * tokens / seconds / job.peak_flops
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            values["memory/device_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
        kib = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
        values["memory/host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib / 2**30
        return values
