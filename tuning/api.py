"""The same things from Python: `tuning.train` and `evaluate` here, `tuning.load` from loaded.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tuning import build, weights
from tuning.core import config as configs
from tuning.core import tree
from tuning.core.types import Batch, TrainState, Tree
from tuning.data import loader
from tuning.loaded import LoadedModel, load, stop_ids
from tuning.methods.method import added
from tuning.plan import cost, stored
from tuning.training import loop, provenance, state, step, workdir
from tuning.training.checkpoint import Checkpoints
from tuning.training.progress import Display
from tuning.training.writer import Writer

OnEval = Callable[[int, dict[str, float]], None]


def train(
    config: Mapping[str, Any], workdir_path: str | Path, *, argv: Sequence[str] = (), on_eval: OnEval | None = None,
    compiled: str | Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Runs a config (a nested dict or ConfigDict) in a directory, or goes on with the run that is there.

    `compiled` is a train step that a plan has stored; it is a pickle, to be trusted as code is.

    `on_eval` hears of each evaluation of this process once it is saved: the step, and every measure as it was last. It may end the run by
    raising; with several processes it is called in all of them, and all must do the same.

    Returns the final measures: `train/loss`, `eval/loss`, `best/eval/loss` and `before/eval/loss` (nats per learned token; the last is that
    before the first step), the same of data.kept, `step`, ...
    ValueError for a mistake in config or data, before anything is compiled; loop.Interrupted after a signal, with the state saved.
    """
    enable_compilation_cache()
    parts = build.parts(config)
    with opened(parts, Path(workdir_path)) as run, jax.set_mesh(parts.model.mesh):
        return train_opened(run, argv, on_eval, stored.load(Path(compiled), parts) if compiled else None)


def train_opened(run: Opened, argv: Sequence[str] = (), on_eval: OnEval | None = None, compiled: Any = None) -> dict[str, float]:
    """What `train` does in a directory that is open, with its step if that is there already."""
    parts, m, seed = run.parts, run.parts.model, run.parts.config["seed"]
    display = Display(run.path.name, parts.settings.steps, 0, run.first)
    display.say(said := summary(parts))
    began, meta = time.monotonic(), {}
    if run.checkpoints.last() is None:
        start = state.start(weights.start_params(m, seed), m.tuned, parts.optimizer.transform, m.mesh)
    else:
        start, meta = restore(parts, run.checkpoints)
        display.say(f"Going on from step {int(start.step)}.")
    run.begin(meta, argv)
    loaded = time.monotonic()
    ready = "read from its file" if compiled else "compiled"
    compiled = compiled or step.jit(parts.train_step(seed), start, loader.abstract(parts.train, parts.settings.batch_size, m.mesh))
    display.say(f"Weights ready in {loaded - began:.1f} s, train step {ready} in {time.monotonic() - loaded:.1f} s.")
    display = Display(run.path.name, parts.settings.steps, int(start.step), run.first)
    with run.writer(int(start.step), meta, said) as writer:
        _, final = loop.run(run.job(compiled, run.data, evaluator(parts), writer, display, on_eval), start, meta.get("memory"))
        run.checkpoints.wait()
    return final


@contextlib.contextmanager
def opened(parts: build.Parts, path: Path) -> Iterator[Opened]:
    """Takes a directory for a run. ValueError if another run is in it, or its data has changed."""
    first = jax.process_index() == 0
    lock = workdir.claim(path, configs.plain(parts.config)) if first else contextlib.nullcontext()
    keep = parts.checkpoint
    with lock, contextlib.closing(Checkpoints(path / "checkpoints", keep_last=keep.keep_last, keep_best=keep.keep_best)) as checkpoints:
        mixed = parts.train if parts.mixture is None else parts.mixture
        data = loader.Loader(mixed, batch_size=parts.settings.batch_size, seed=parts.config["seed"], mesh=parts.model.mesh)
        run = Opened(parts, path, first, checkpoints, data)
        if checkpoints.last() is not None:
            workdir.check_data(path, run.digests)
        yield run


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run in a directory that is its own; `first` of the processes writes there."""

    parts: build.Parts
    path: Path
    first: bool
    checkpoints: Checkpoints
    data: loader.Loader

    @property
    def digests(self) -> dict[str, str]:
        parts = self.parts
        return {name: rows.digest for name, rows, _ in parts.sources} | {name: rows.digest for name, rows in parts.held_out.items()}

    def begin(self, meta: Mapping[str, Any], argv: Sequence[str]) -> None:
        """Notes what the run is and, for a new one, where it comes from; one that goes on, with its checkpoint's `meta`, finds its data."""
        if meta:
            self.data.seek(meta["data"])
        elif self.first:
            workdir.write_json(self.path / "provenance.json", provenance.collect(argv or sys.argv, self.digests))
        if self.first:
            workdir.write_json(self.path / "config.json", configs.plain(self.parts.config))

    def writer(self, at: int, meta: Mapping[str, Any], said: str) -> Writer:
        """For what happens after a step; of a new run, with what was said of it."""
        log, config = self.parts.log, configs.plain(self.parts.config)
        writer = Writer(self.path, after=at if meta else -1, to=log.to, config=config)
        if not meta:
            writer.text(0, "summary", said.replace("\n", "\n\n"))
        return writer

    def job(self, step: Any, data: Any, evaluate: Any, writer: Writer, display: Display, on_eval: OnEval | None) -> loop.Job:
        parts = self.parts
        return loop.Job(
            step, data, parts.settings, parts.evaluation, parts.checkpoint, parts.optimizer.learning_rate, self.checkpoints, writer,
            display, evaluate=evaluate, sample=sampler(parts), on_eval=on_eval,
            flops_per_token=cost.flops_per_token(parts), peak_flops=cost.peak_flops(parts.model.mesh),
        )  # fmt: skip


def restore(parts: build.Parts, checkpoints: Checkpoints, which: str | int = "last") -> tuple[TrainState, dict[str, Any]]:
    """A saved train state on this run's mesh; frozen leaves come from the base model."""
    m = parts.model
    at, tuned, optimizer, meta = checkpoints.restore(which, *own_layout(parts))
    frozen = weights.base_params(m, lambda name: not m.tuned(name), parts.config["seed"])
    return TrainState(state.at(at, m.mesh), tuned, frozen, optimizer), meta


def own_layout(parts: build.Parts) -> tuple[Tree, Tree]:
    """(leaves that learn, optimiser state) as ShapeDtypeStructs: what a checkpoint of the run holds."""
    m = parts.model
    learns, _ = tree.split(m.layout, m.tuned)
    return learns, state.optimizer_layout(parts.optimizer.transform, learns, m.mesh)


def held_out(parts: build.Parts) -> Iterator[tuple[str, Iterator[Batch]]]:
    """(name, batches) of data.eval and data.kept, each row once."""
    size = parts.evaluation.batch_size or parts.settings.batch_size // parts.settings.accumulate
    for name, rows in parts.held_out.items():
        yield name, loader.once(rows, batch_size=size, mesh=parts.model.mesh)


def evaluator(parts: build.Parts):
    """state -> measures on data.eval (`eval/loss`, ...) and on data.kept (`kept/loss`, ...); None if there is no data."""
    if not parts.held_out:
        return None
    judge = step.eval_step(parts.model.network.apply, parts.loss, parts.base)
    compiled = jax.jit(lambda params, batch: judge(tree.merge(*params), batch))

    def evaluate(s: TrainState) -> dict[str, float]:
        found = {}
        for name, batches in held_out(parts):
            found |= named(name, step.evaluate(compiled, (s.tuned, s.frozen), batches))
        return found

    return evaluate


def named(data: str, measures: dict[str, float]) -> dict[str, float]:
    """Measures under the name of what they were taken on."""
    return {f"{data}/{key}": value for key, value in _with_perplexity(measures).items()}


def _with_perplexity(measures: dict[str, float]) -> dict[str, float]:
    return {**measures, "perplexity": math.exp(min(measures["nll"], 700))}


def sampler(parts: build.Parts):
    """state -> greedy continuations of eval.prompts, as Markdown; None without prompts."""
    prompts = parts.evaluation.prompts
    if not prompts:
        return None

    def sample(s: TrainState) -> str:
        model = LoadedModel(parts.model, tree.merge(s.tuned, s.frozen), stop_ids(parts.model.source))
        texts = model.generate(list(prompts), max_new_tokens=parts.evaluation.max_new_tokens)
        return "\n\n".join(f"**{prompt}**{text}" for prompt, text in zip(prompts, texts, strict=True))

    return sample


def summary(parts: build.Parts) -> str:
    """What a run is about to do, in a few lines."""
    m = parts.model
    tuned, frozen = tree.split(m.layout, m.tuned)
    some, every = tree.size(tree.split(tuned, m.moves)[0]), tree.size(m.layout)
    shape = {axis: size for axis, size in m.mesh.shape.items() if size > 1} or "one device"
    config, optimizer = m.source.config, state.optimizer_layout(parts.optimizer.transform, tuned, m.mesh)
    share = cost.flops_per_token(parts) / cost.flops_per_token(parts, full=True)
    form, why = build.attention(m.source, m.method, m.mesh, parts.train.length)
    return (
        f"trainable params: {some:,} || all params: {every:,} || trainable%: {100 * some / every:.4f}\n"
        f"bytes that learn: {tree.nbytes(tuned):,} || frozen: {tree.nbytes(frozen):,} || optimizer: {tree.nbytes(optimizer):,} || "
        f"FLOPs%: {100 * share:.1f} of full tuning\n"
        f"mesh: {shape} ({m.mesh.devices.flat[0].device_kind}); computes in {config.dtype}"
        f"{f', matmul precision {config.precision}' if config.dtype == 'float32' else ''}; remat {config.remat}"
        f"{f'; attention {form}' if form else ''}{f' ({why})' if why else ''}\n"
        + "\n".join(
            [f"{name} data{'' if share == 1 else f', {share:.1%} of the rows'}: {rows.report}" for name, rows, share in parts.sources]
            + [f"{name} data: {rows.report}" for name, rows in parts.held_out.items()]
        )
    )


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in a directory that only this user can write: who writes it runs code in our processes."""
    if jax.config.values.get("jax_compilation_cache_dir"):
        return
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuning" / "compiled"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def evaluate(
    model: LoadedModel, config: Mapping[str, Any], split: str = "eval", batch_size: int = 8, base: bool = False
) -> dict[str, float]:
    """The measures of the config's objective on data.eval, data.train or data.kept, each row read once: loss, nll, perplexity, accuracy.

    base  whether those of the model before it was tuned are measured too, as `base/loss` and so on
    """
    found = _evaluate(model, [config], split, batch_size)[0]
    if not base:
        return found
    before = _evaluate(model, [config], split, batch_size, _base_params(model, config))[0]
    return found | {f"base/{name}": value for name, value in before.items() if name != "tokens"}


def _base_params(model: LoadedModel, config: Mapping[str, Any]) -> Tree:
    """The parameters of the model before it was tuned. What was new then starts as it started in the run."""
    m = model.model
    if model.run is None and model.method["name"] == "full":
        raise ValueError(f"{m.source.path} is no run and has no adapter: it is a base itself. Leave out `base`.")
    changed = build.base_leaves(m)
    if model.run is None and (new := weights.absent(m.source).intersection(changed)):
        raise ValueError(f"{', '.join(sorted(new))} came with the adapter: the base has no such head to measure. Leave out `base`.")
    if not changed:
        return model.params
    with jax.set_mesh(m.mesh):
        return weights.base_params(m, lambda name: not added(name), build.resolve(config)["seed"])


def _evaluate(
    model: LoadedModel, runs: Sequence[Mapping[str, Any]], split: str, batch_size: int, base_params: Tree | None = None
) -> list[dict[str, float]]:
    """The same of configs that differ in their data alone; compiled once. With `base_params`, of the model without its method."""
    m, found, compiled = model.model, [], None
    apply, params = (m.network.apply, model.params) if base_params is None else (build.base(m), base_params)
    for config in runs:
        c = build.resolve(config)
        bind = functools.partial(configs.bind, build.SECTIONS, c)
        build.check_objective(m.source, c["objective"]["name"])
        rows = bind(f"data.{split}")(m.reader, bind(f"data.{split}.format")())
        compiled = compiled or jax.jit(step.eval_step(apply, bind("objective")(), build.compared(m, c["objective"])))
        with jax.set_mesh(m.mesh):
            measures = step.evaluate(compiled, params, loader.once(rows, batch_size=batch_size, mesh=m.mesh))
        found.append({**_with_perplexity(measures), "tokens": rows.report.learned})
    return found


def rank_prompts(
    model: LoadedModel, config: Mapping[str, Any], prompts: Sequence[str], batch_size: int = 8
) -> list[tuple[str, dict[str, float]]]:
    """The prompts with their measures on the config's data.eval, the one with the lowest loss first (discrete prompt search).

    prompts  templates as format.prompt has them, with columns in braces: "Question: {question}\\nAnswer:"
    ValueError for prompts that are none, or the same twice, and for a format other than pairs.
    """
    if not prompts or len(set(prompts)) < len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts, {len(set(prompts))} of them different. Give some, each once.")
    c = build.resolve(config)
    if (name := c["data"]["eval"]["format"]["name"]) != "pairs":
        raise ValueError(f"Prompts are compared by the answers that follow them: data.eval.format.name={name!r} must be 'pairs'.")
    runs = [configs.override({}, c, {"data.eval.format.prompt": prompt}) for prompt in prompts]
    measured = _evaluate(model, runs, "eval", batch_size)
    return sorted(zip(prompts, measured, strict=True), key=lambda pair: pair[1]["loss"])


def propose_prompts(model: LoadedModel, ask: str, count: int, like: Sequence[str]) -> list[str]:
    """Up to `count` prompts that the model samples after `ask`: those that are new and name the same columns as the first of `like`.

    ValueError if there is nothing to take the columns from, or if none of what the model says is such a prompt.
    """
    if not like:
        raise ValueError("A proposed prompt must name the columns that the first given one names. Give one.")
    columns = lambda text: set(re.findall(r"{(\w+)}", text))  # noqa: E731
    said = [model.generate(ask, max_new_tokens=64, temperature=1.0, seed=seed)[0] for seed in range(count)]
    found = [text for text in dict.fromkeys(said) if columns(text) == columns(like[0]) and text not in like]
    if not found:
        raise ValueError(f"None of {count} proposals names the columns {sorted(columns(like[0]))}; the first was {said[0][:80]!r}.")
    return found


__all__ = ["LoadedModel", "evaluate", "load", "propose_prompts", "rank_prompts", "train"]
