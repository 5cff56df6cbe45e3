"""Many short runs of many methods on one budget: a method is compiled once for all its rates and seeds, and what was measured is kept.

A run's learning rate is an array of its state, so that runs which differ by rate or seed share one program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tuning import build, weights
from tuning.api import enable_compilation_cache
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import TrainState
from tuning.data import loader
from tuning.training import state, step
from tuning.training.optimizer import Optimizer

Record = dict[str, Any]
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: config.method, the learning rates that are tried, ascending, and keys of config.model if it has its own."""

    name: str
    method: dict[str, Any]
    rates: tuple[float, ...]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: the config of a row at a rate and a seed, and the held-out measure by which a rate is chosen."""

    rows: Sequence[Row]
    config: Callable[[Row], Mapping[str, Any]]
    measure: str
    higher: bool

    def best(self, records: Sequence[Record]) -> Record:
        """The record with the best measure; one that is not finite is worse than any other."""
        sign = 1 if self.higher else -1
        return max(records, key=lambda r: (math.isfinite(r[self.measure]), sign * r[self.measure]))


# The settings that the experiments share, by the row's name.
METHODS: dict[str, dict[str, Any]] = {
    "full": dict(name="full"),
    "partial: last layer": dict(name="partial", last_layers=1),
    "lora": dict(name="lora", rank=8, alpha=16.0),
    "lora, dora": dict(name="lora", rank=8, alpha=16.0, dora=True),
    "lora, pissa": dict(name="lora", rank=8, alpha=8.0, init="pissa"),
    "lora, nf4 base": dict(name="lora", rank=8, alpha=16.0),
    "adalora": dict(name="adalora", init_rank=12, target_rank=8, alpha=24.0),
    "vera": dict(name="vera", rank=256),
    "loha": dict(name="loha", rank=8, alpha=16.0),
    "lokr": dict(name="lokr", rank=8, alpha=16.0),
    "ia3": dict(name="ia3"),
    "bottleneck, houlsby": dict(name="bottleneck", width=16, place="houlsby"),
    "bottleneck, pfeiffer": dict(name="bottleneck", width=16, place="pfeiffer"),
    "bottleneck, parallel": dict(name="bottleneck", width=16, place="parallel", scale=4.0),
    "prompt": dict(name="prompt", length=10),
    "p_tuning": dict(name="p_tuning", length=10),
    "prefix": dict(name="prefix", length=10),
}


def shared(name: str, rates: tuple[float, ...], **model: Any) -> Row:
    """A row of METHODS."""
    return Row(name, METHODS[name], rates, model)


def rated(optimizer: Optimizer) -> optax.GradientTransformation:
    """The optimizer, its learning rate multiplied by a number that stands first in its state."""

    def at(rate: Any) -> optax.GradientTransformation:
        return dataclasses.replace(optimizer, learning_rate=lambda count: rate * optimizer.learning_rate(count)).transform

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate, inner = state
        updates, inner = at(rate).update(updates, inner, params)
        return updates, (rate, inner)

    return optax.GradientTransformation(lambda params: (jnp.float32(1), at(1.0).init(params)), update)


def program(config: Mapping[str, Any]) -> Callable[[float, int], Record]:
    """(learning rate, seed) -> what one run measures, all runs by the same compiled step.

    cpu_seconds   processor time of this process per update; no loading, compiling or evaluation
    trained       parameters that learn
    bytes         theirs and their optimiser state's
    temporaries, arguments  bytes of the compiled step, as its compiler counts them
    """
    base = build.resolve(config)
    parts = build.parts(configs.override(build.SECTIONS, base, {"optimizer.learning_rate": 1.0}))
    m, settings, held_out = parts.model, parts.settings, parts.eval
    assert held_out is not None
    transform = rated(parts.optimizer)
    learns, rests = tree.split(m.layout, m.tuned)
    moments = state.optimizer_layout(transform, learns, m.mesh)
    at = jax.ShapeDtypeStruct((), np.int32, sharding=meshes.replicated(m.mesh))
    with jax.set_mesh(m.mesh):
        begun, batch = TrainState(at, learns, rests, moments), loader.abstract(parts.train, settings.batch_size, m.mesh)
        compiled = step.jit(parts.train_step(0, transform), begun, batch)
    judge, sizes = jax.jit(step.eval_step(m.network.apply, parts.loss)), compiled.memory_analysis()
    assert sizes is not None
    fixed = dict(
        trained=tree.size(tree.split(learns, m.moves)[0]), bytes=tree.nbytes(learns) + tree.nbytes(moments[1]),
        temporaries=sizes.temp_size_in_bytes, arguments=sizes.argument_size_in_bytes, eval_targets=held_out.report.learned,
    )  # fmt: skip

    def run(rate: float, seed: int) -> Record:
        with jax.set_mesh(m.mesh):
            data = loader.Loader(parts.train, batch_size=settings.batch_size, seed=seed, mesh=m.mesh)
            batches = [data.batch(number) for number in range(settings.steps)]
            now = state.start(weights.start_params(m, seed), m.tuned, transform, m.mesh)
            now = dataclasses.replace(now, optimizer=(jax.device_put(np.float32(rate), now.optimizer[0].sharding), now.optimizer[1]))
            jax.block_until_ready((now, batches))
            began, means = time.process_time(), {}
            for batch in batches:
                now, means = compiled(now, batch)
            last = float(means["loss"].value)
            seconds = (time.process_time() - began) / settings.steps
            rows = loader.once(held_out, batch_size=parts.evaluation.batch_size or settings.batch_size, mesh=m.mesh)
            measures = step.evaluate(judge, tree.merge(now.tuned, now.frozen), rows)
        return {**fixed, **measures, "train_loss": last, "cpu_seconds": seconds}

    return run


def run(plan: Plan, out: Path, only: str = "", say: Callable[[str], None] = print) -> list[Record]:
    """Makes the runs that `out`/runs.jsonl does not hold yet, of the rows whose name `only` matches: each rate with the first seed, then
    the other seeds at the best. Returns the records of all rows of the plan."""
    enable_compilation_cache()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "runs.jsonl"
    kept.write_text("".join(json.dumps(record) + "\n" for record in load(kept)), encoding="utf-8")  # without a line that was cut short
    for row in plan.rows:
        if not re.search(only, row.name):
            continue
        mark, made = digest(plan.config(row)), None

        def measured(rate: float, seed: int, row=row, mark=mark) -> Record:
            nonlocal made
            if (known := find(load(kept), mark, rate, seed)) is not None:
                return known
            made = made or program(plan.config(row))
            record = {"row": row.name, "config": mark, "rate": rate, "seed": seed, **made(rate, seed)}
            with kept.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            say(f"{row.name}, rate {rate:g}, seed {seed}: {plan.measure} {record[plan.measure]:.4f}, {record['cpu_seconds']:.3f} s a step")
            return record

        best = plan.best([measured(rate, SEEDS[0]) for rate in row.rates])
        for seed in SEEDS[1:]:
            measured(best["rate"], seed)
    return load(kept)


def load(kept: Path) -> list[Record]:
    """The records so far. A last line that was cut short counts as not there."""
    if not kept.exists():
        return []
    whole = kept.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def digest(config: Mapping[str, Any]) -> str:
    """What stands for a config, but for its learning rate and seed."""
    return hashlib.sha256(json.dumps(configs.plain(config), sort_keys=True).encode()).hexdigest()[:12]


def find(records: Sequence[Record], mark: str, rate: float, seed: int) -> Record | None:
    return next((r for r in records if (r["config"], r["rate"], r["seed"]) == (mark, rate, seed)), None)


def table(plan: Plan, records: Sequence[Record], shown: Callable[[float], str]) -> str:
    """The rows that are complete, as Markdown; `shown` writes a measure. A best rate at the edge of those tried is marked with a star."""
    lines = [
        f"| method | trained | best rate | {plan.measure}, mean ± sd of {len(SEEDS)} seeds | at each rate tried, seed {SEEDS[0]} | "
        "spread | CPU s per step | learned + optimiser bytes | temporaries + arguments of the step, bytes |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in plan.rows:
        mark = digest(plan.config(row))
        tried = [r for rate in row.rates if (r := find(records, mark, rate, SEEDS[0])) is not None]
        if len(tried) < len(row.rates):
            continue
        best = plan.best(tried)
        again = [r for seed in SEEDS if (r := find(records, mark, best["rate"], seed)) is not None]
        if len(again) < len(SEEDS):
            continue
        values, every = [r[plan.measure] for r in again], [r[plan.measure] for r in tried]
        edge = "*" if best["rate"] in (row.rates[0], row.rates[-1]) else ""
        each = ", ".join(f"{r['rate']:g}: {shown(r[plan.measure])}" for r in tried)
        seconds = statistics.median(r["cpu_seconds"] for r in [*tried, *again[1:]])
        lines.append(
            f"| {row.name} | {best['trained']:,} | {best['rate']:g}{edge} | {shown(statistics.mean(values))} ± "
            f"{shown(statistics.stdev(values))} | {each} | {shown(max(every) - min(every))} | {seconds:.3f} | {best['bytes']:,} | "
            f"{best['temporaries']:,} + {best['arguments']:,} |"
        )
    return "\n".join(lines)
