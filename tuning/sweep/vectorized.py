"""Runs that differ in numbers alone, as one compiled program: which ones can be, and training them.

What may differ is NUMBERS, the seed, and what the method calls loose; ranks where the optimizer works on each element alone, since it
leaves zeros at zero then. Everything else is part of the program, or of its batches' shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tuning import api, build, weights
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.config import Config
from tuning.core.types import Mean, TrainState, Tree
from tuning.data import loader
from tuning.methods.method import added
from tuning.training import many, state, step
from tuning.training.many import Outcome
from tuning.training.optimizer import is_usual
from tuning.training.progress import Display, Voice

# Keys whose numbers may differ. Where the flag is set, 0 means that something is left out of the program, so all of them are 0 or none is.
NUMBERS = {
    "optimizer.learning_rate": False, "optimizer.weight_decay": True, "optimizer.schedule.warmup_steps": False,
    "optimizer.schedule.decay_steps": False, "optimizer.schedule.final": False, "train.clip_norm": True,
}  # fmt: skip
WHOLE = ("optimizer.schedule.warmup_steps", "optimizer.schedule.decay_steps")
ELEMENTWISE = ("adamw", "sgd", "lion")  # optimizers that treat each number alone, and leave zeros without a gradient at zero
LARGEST = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that are one program, by their places in the list of configs; `alone` says of a single one why it is single."""

    runs: tuple[int, ...]
    alone: str = ""


def groups(configs_: Sequence[Mapping[str, Any]], largest: int = LARGEST) -> list[Group]:
    """The runs dealt out to programs of at most `largest`, in the order of their first. ValueError for a config with a mistake in it."""
    if largest < 1:
        raise ValueError(f"A program holds at least one run, and largest={largest}.")
    kinds = _kinds([build.resolve(config) for config in configs_])
    found: list[Group] = []
    for i, kind in enumerate(kinds):
        if any(i in group.runs for group in found):
            continue
        same = [j for j in range(i, len(kinds)) if not kind.refusal and kinds[j].facts == kind.facts]
        same = [j for j in _beneath_one(kinds, same) if not any(j in group.runs for group in found)] or [i]
        if len(same) == 1:
            found.append(Group((i,), kind.refusal or _difference(kind, [*kinds[:i], *kinds[i + 1 :]])))
        size = -(-len(same) // -(-len(same) // largest))  # programs of about one size
        found += [Group(tuple(same[at : at + size])) for at in range(0, len(same), size) if len(same) > 1]
    return sorted(found, key=lambda group: group.runs)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What makes a program.

    facts    {name: value} of all that must be equal
    shapes   of the leaves that learn
    refusal  why the run cannot share a program with any other, or ""
    """

    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    refusal: str


def _kinds(resolved: Sequence[Config]) -> list[Kind]:
    said = lambda c, *keys: json.dumps(configs.plain([c[key] for key in keys]), sort_keys=True)  # noqa: E731
    sources: dict[str, Any] = {}  # by the config's section
    models: dict[str, build.Model] = {}  # by the sections that they are made of
    for c in resolved:
        bind = functools.partial(configs.bind, build.SECTIONS, c)
        if (source := said(c, "model")) not in sources:
            sources[source] = bind("model")()
        if (model := said(c, "model", "mesh", "method")) not in models:
            models[model] = build.model(sources[source], bind("method")(build.outline(sources[source])), bind("mesh")())
    return [_kind(c, models[said(c, "model", "mesh", "method")]) for c in resolved]


def _kind(c: Config, m: build.Model) -> Kind:
    facts = configs.flat(configs.plain(c))
    for key, zero_counts in NUMBERS.items():
        if _is_number(value := facts.get(key)):
            facts[key] = "0" if zero_counts and value == 0 else "a number"
    for key in m.method.loose:
        facts.pop(f"method.{key}", None)
    if m.source.directory is not None:
        facts.pop("seed")  # of a base that was published it draws nothing
    leaves = {name: leaf for name, leaf in tree.flatten(m.layout).items() if m.tuned(name)}
    axes, rank = tree.flatten(m.network.axes), "any" if c["optimizer"]["name"] in ELEMENTWISE else None
    paces = {name: m.pace(name) for name in leaves}
    facts["the optimizer's paces"] = all(map(is_usual, paces.values()))
    for name, leaf in leaves.items():
        facts[f"shape of {name}"] = tuple(rank if rank and axis == "rank" else n for n, axis in zip(leaf.shape, axes[name], strict=True))
        facts[f"pace of {name}"] = (paces[name].begin, tuple(rate > 0 for rate in np.atleast_1d(paces[name].rate)))
    refusal = "" if any(not m.tuned(name) for name in tree.flatten(m.layout)) else f"method.name={c['method']['name']} changes every weight"
    return Kind(facts, {name: leaf.shape for name, leaf in leaves.items()}, refusal)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beneath_one(kinds: Sequence[Kind], runs: Sequence[int]) -> list[int]:
    """Those of the runs whose leaves fit into the largest one's."""
    size = lambda j: sum(map(np.prod, kinds[j].shapes.values()))  # noqa: E731
    whole = kinds[max(runs, key=size)].shapes if runs else {}
    return [j for j in runs if all(a <= b for name in whole for a, b in zip(kinds[j].shapes[name], whole[name], strict=True))]


def _difference(kind: Kind, others: Sequence[Kind]) -> str:
    """What keeps a run from the one that is most like it."""
    apart = [[key for key in {**kind.facts, **other.facts} if kind.facts.get(key) != other.facts.get(key)] for other in others]
    if not apart:
        return "there is no other run"
    nearest = min(range(len(apart)), key=lambda j: len(apart[j]))
    if not (keys := apart[nearest]):
        return others[nearest].refusal or "its ranks do not fit into those of a run like it"
    return f"no other run has its {keys[0]}={kind.facts.get(keys[0])!r} (the nearest one has {others[nearest].facts.get(keys[0])!r})"


def train_many(
    runs: Sequence[Mapping[str, Any]], workdirs: Sequence[str | Path], *, argv: Sequence[str] = (),
    on_eval: Sequence[api.OnEval | None] | None = None,
) -> list[Outcome]:  # fmt: skip
    """Trains runs that can be one program (`groups` says which can), each in its directory as `api.train` would, or goes on with them.

    Runs that stand at different steps go on one group of equal steps after the other. `on_eval` has for each run what `api.train` takes.
    Returns for each run its final measures, or the exception that ended it: a run that fails ends no other. ValueError where they cannot
    be one program; loop.Interrupted after a signal, with the state of all runs saved.
    """
    api.enable_compilation_cache()
    if len(runs) != len(workdirs) or len({Path(path).absolute() for path in workdirs}) < len(runs):
        raise ValueError(f"{len(runs)} runs need as many directories, each another one; there are {len(workdirs)}: {list(workdirs)}.")
    if len(found := groups(runs, len(runs))) > 1:
        why = next((group.alone for group in found if group.alone), "their ranks do not fit into one another")
        raise ValueError(f"These runs are not one program: {why}.")
    hears, outcomes = list(on_eval or [None] * len(runs)), dict[int, Outcome]()
    parts = _parts(runs)
    with contextlib.ExitStack() as stack, jax.set_mesh(parts[0].model.mesh):
        opened = [stack.enter_context(api.opened(p, Path(path))) for p, path in zip(parts, workdirs, strict=True)]
        steps = [run.checkpoints.last() or 0 for run in opened]
        for at in sorted(set(steps)):
            own = [i for i, one in enumerate(steps) if one == at]
            outcomes |= zip(own, _train([opened[i] for i in own], argv, [hears[i] for i in own]), strict=True)
    return [outcomes[i] for i in range(len(runs))]


def _parts(runs: Sequence[Mapping[str, Any]]) -> list[build.Parts]:
    """The parts of each. Data are read once, and a network is built once."""
    made: list[build.Parts] = []
    for config in map(build.resolve, runs):
        like = next((p for p in made if p.config["method"] == config["method"]), made[0] if made else None)
        made.append(build.parts(config, like))
    return made


def _train(runs: Sequence[api.Opened], argv: Sequence[str], hears: Sequence[api.OnEval | None]) -> list[Outcome]:
    """Runs that stand at one step, in one program."""
    parts, names, began = [run.parts for run in runs], [run.path.name for run in runs], time.monotonic()
    whole = largest_of(parts)
    m, settings, first = whole.model, whole.settings, runs[0].first
    display = Display(f"{len(runs)} runs", settings.steps, 0, first)
    said = [api.summary(p) for p in parts]
    apart = meshes.pieces(len(runs), "members")
    dealt = f", {len(runs) // apart} on each of {apart} copies of the base" if apart > 1 else ""
    display.say(f"{len(runs)} runs in one program{dealt}: {', '.join(names)}\n{said[0]}")
    if (saved := runs[0].checkpoints.last()) is None:
        start, metas = begun(parts, whole), [{} for _ in runs]
    else:
        start, metas = _restored(runs, whole, saved)
    for run, meta in zip(runs, metas, strict=True):
        run.begin(meta, argv)
    loaded = time.monotonic()
    stepping = program(parts, whole, start)
    display.say(f"Weights ready in {loaded - began:.1f} s, train step compiled in {time.monotonic() - loaded:.1f} s.")
    display, at = Display(f"{len(runs)} runs", settings.steps, int(start.step), first), int(start.step)
    with contextlib.ExitStack() as stack:
        batches = many.batches(whole.train if whole.mixture is None else whole.mixture, [run.data for run in runs], m.mesh)
        stack.enter_context(contextlib.closing(batches))
        judge = _judge(parts, whole) if whole.held_out else None
        group = many.Group(stepping, start, batches, [api.own_layout(p) for p in parts], judge)
        writers = [run.writer(at, meta, text) for run, meta, text in zip(runs, metas, said, strict=True)]
        jobs = [
            dataclasses.replace(
                run.job(group.step, many.Turns(run.data), judge and group.evaluate, writer, Voice(display, run.path.name), hear),
                sharing=len(runs),
            )
            for run, writer, hear in zip(runs, writers, hears, strict=True)
        ]
        outcomes: list[Outcome] = []
        try:
            outcomes = many.run(jobs, group, [meta.get("memory") for meta in metas], display)
        finally:
            for k, writer in enumerate(writers):
                writer.close(done=bool(outcomes) and isinstance(outcomes[k], dict))
    return outcomes


def largest_of(parts: Sequence[build.Parts]) -> build.Parts:
    """The run into whose leaves those of all others fit: the program is its own."""
    return max(parts, key=lambda p: tree.size(api.own_layout(p)[0]))


def program(parts: Sequence[build.Parts], whole: build.Parts, start: TrainState) -> Callable:
    """(stacked state, stacked batch) -> (stacked state, stacked measures): one train step of all, compiled."""
    batch = loader.abstract(whole.train, whole.settings.batch_size, where := whole.model.mesh, (len(parts),))
    stepping = many.train_step(functools.partial(_member_step, whole), meshes.members(len(parts), where), where)
    return many.compiled(stepping, _numbers(parts, whole), start, batch)


def _layouts(parts: Sequence[build.Parts]) -> list[Tree]:
    """Of the stacked leaves that learn, and of the stacked optimiser states."""
    return [many.layout(own) for own in zip(*map(api.own_layout, parts), strict=True)]


def begun(parts: Sequence[build.Parts], whole: build.Parts) -> TrainState:
    """The stacked state before the first step. The base is read once."""
    m, (tuned_layout, optimizer_layout) = whole.model, _layouts(parts)
    params = weights.start_params(m, whole.config["seed"])
    frozen = tree.split(params, lambda name: not m.tuned(name))[0]
    tuned = many.stack([_own_start(p, params) for p in parts], tuned_layout)
    places = jax.tree.map(lambda x: x.sharding, optimizer_layout)
    optimizer = jax.jit(jax.vmap(whole.optimizer.transform.init), out_shardings=places)(tuned)
    return TrainState(state.at(0, m.mesh), tuned, frozen, optimizer)


def _restored(runs: Sequence[api.Opened], whole: build.Parts, at: int) -> tuple[TrainState, list[dict[str, Any]]]:
    """The stacked state of a step that all have saved, and what their checkpoints noted."""
    m, layouts = whole.model, _layouts([run.parts for run in runs])
    saved = [run.checkpoints.restore(at, *api.own_layout(run.parts)) for run in runs]
    frozen = weights.base_params(m, lambda name: not m.tuned(name), whole.config["seed"])
    tuned, optimizer = (many.stack([one[i + 1] for one in saved], layout) for i, layout in enumerate(layouts))
    return TrainState(state.at(at, m.mesh), tuned, frozen, optimizer), [one[3] for one in saved]


def _own_start(parts: build.Parts, params: Tree) -> Tree:
    """What a run's leaves that learn start from; `params` are another run's parameters, as its training starts from them."""
    m, seed = parts.model, parts.config["seed"]
    if m.method.residual is not None:
        return tree.split(weights.start_params(m, seed), m.tuned)[0]  # its start is made while the base is read
    drawn = weights.absent(m.source)
    own = weights.base_params(m, lambda name: m.tuned(name) and (added(name) or name in drawn), seed)
    started = m.method.start(tree.unflatten({**tree.flatten(params), **tree.flatten(own)}))
    if m.source.adapter is not None:
        started = weights.with_adapter(m, started, m.source.adapter)
    return tree.split(started, m.tuned)[0]


def _numbers(parts: Sequence[build.Parts], whole: build.Parts) -> dict[str, Any]:
    """What the members differ in, stacked: seeds, numbers of the config, rates of leaves that differ, gains over those of `whole`."""
    learning = [name for name in tree.flatten(whole.model.layout) if whole.model.tuned(name)]
    shared = configs.flat(whole.config)
    keys = [key for key, zero_counts in NUMBERS.items() if _is_number(value := shared.get(key)) and not (zero_counts and value == 0)]
    kind = lambda key: np.int32 if key in WHOLE else np.float32  # noqa: E731
    rates = {name: np.array([p.model.pace(name).rate for p in parts], np.float32) for name in learning}
    gains = {name: np.array([p.model.method.gain(name) / whole.model.method.gain(name) for p in parts], np.float32) for name in learning}
    found = {
        "seed": np.array([p.config["seed"] for p in parts], np.int64).astype(np.int32),  # as jax.random.key takes them
        "config": {key: np.array([configs.dig(p.config, key) for p in parts], kind(key)) for key in keys},
        "rates": {name: x for name, x in rates.items() if (x != x[:1]).any()},
        "gains": {name: x for name, x in gains.items() if (x != 1).any()},
    }
    return jax.tree.map(lambda x: jax.device_put(x, meshes.replicated(whole.model.mesh)), found)


def _member_step(whole: build.Parts, numbers: dict[str, Any]) -> Callable:
    """The train step of the member that has these numbers."""
    config = configs.override({}, whole.config, numbers["config"])
    settings = dataclasses.replace(whole.settings, clip_norm=config["train"]["clip_norm"])
    optimizer = build.optimized(config, whole.model, numbers["rates"])
    parts = dataclasses.replace(whole, config=config, settings=settings, optimizer=optimizer)
    return parts.train_step(numbers["seed"], apply=many.gained(whole.model.network.apply, numbers["gains"]))


def _judge(parts: Sequence[build.Parts], whole: build.Parts) -> Callable[[TrainState], list[dict[str, float]]]:
    """state -> each member's measures on the held-out data, which all of them read at once."""
    all_gains, where = _numbers(parts, whole)["gains"], whole.model.mesh

    def one(gains: Any, tuned: Tree, frozen: Tree, batch: Any) -> Any:
        apply = many.gained(whole.model.network.apply, gains)
        return step.eval_step(apply, whole.loss, whole.base)(tree.merge(tuned, frozen), batch)

    each = many.mapped(one, (0, 0, None, None), 0, meshes.members(len(parts), where), where)
    each = jax.jit(each, out_shardings=meshes.replicated(where))

    def judge(s: TrainState) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in parts]
        for name, batches in api.held_out(whole):
            totals = step.totals(lambda params, batch: each(all_gains, *params, batch), (s.tuned, s.frozen), batches)
            for k, own in enumerate(found):
                own |= api.named(name, {key: float(Mean(mean.total[k], mean.weight[k]).value) for key, mean in totals.items()})
        return found

    return judge
