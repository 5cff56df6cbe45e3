"""Where metrics go besides the run's own directory: Weights & Biases and MLflow, each an extra of its own.

A sink is made by `start(root, config, known)`, where `known` is the identity that the run got there when it began, or None for a run that
starts over. Addresses, projects and keys are set where these libraries look for them: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME and so on.
"""

from __future__ import annotations

import html
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from tuning.core import config as configs

TOGETHER = 100  # what one request to MLflow may hold


class Sink(Protocol):
    """`identity` finds the run again; `close` says whether it came to its end."""

    identity: str

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self, done: bool) -> None: ...


class WandB:
    """A run of Weights & Biases. Steps that were written before a run was stopped are not written again: it drops them, they are equal."""

    def __init__(self, root: pathlib.Path, config: Mapping[str, Any], known: str | None):
        import wandb  # pyright: ignore[reportMissingImports]

        self._html = wandb.Html
        resume = "allow" if known else None
        self._run = wandb.init(dir=str(root), name=root.name, config=dict(config), id=known, resume=resume, reinit="create_new")
        self.identity = self._run.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class MLflow:
    """A run of MLflow, by its client: the process may hold several at once."""

    def __init__(self, root: pathlib.Path, config: Mapping[str, Any], known: str | None):
        from mlflow import MlflowClient, entities  # pyright: ignore[reportMissingImports]

        self._entities, self._client = entities, MlflowClient()
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            there = self._client.get_experiment_by_name(name)
            experiment = there.experiment_id if there else self._client.create_experiment(name)
            self.identity = self._client.create_run(experiment, run_name=root.name).info.run_id
            params = [entities.Param(key, str(value)) for key, value in configs.flat(config).items()]
            for some in _batches(params):
                self._client.log_batch(self.identity, params=some)
        else:
            self.identity = known
            self._client.update_run(known, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        for some in _batches([self._entities.Metric(name, value, now, step) for name, value in values.items()]):
            self._client.log_batch(self.identity, metrics=some)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.identity, text, f"{name}/{step}.txt")

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.identity, "FINISHED" if done else "KILLED")


SINKS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], str | None], Sink]] = {"wandb": WandB, "mlflow": MLflow}


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    left = iter(items)
    while some := list(islice(left, TOGETHER)):
        yield some
