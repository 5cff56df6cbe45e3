"""From a config to the parts of a run; the only file that sees every part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.config import Config, Section
from tuning.core.types import Loss, Tree
from tuning.data.dataset import Rows, dataset
from tuning.data.formats import FORMATS
from tuning.data.reader import Reader
from tuning.hub import adapters, checkpoint
from tuning.methods import METHODS
from tuning.methods.method import Method, Pace
from tuning.models import network as networks
from tuning.models.network import Network
from tuning.nn.sites import Outline
from tuning.objectives import OBJECTIVES
from tuning.source import SOURCES, Source
from tuning.training import loop, state
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES, paced

ADDED = ("embed/added", "head/added")  # rows of added tokens: they learn under every method


SECTIONS: dict[str, Section] = {
    "model": Section(SOURCES, "pretrained"),
    "method": Section(METHODS, "lora"),
    "objective": Section(OBJECTIVES, "next_token"),
    "data.train": Section({"": dataset}),
    "data.train.format": Section(FORMATS, "auto"),
    "data.eval": Section({"": dataset}, inherits="data.train", own=("path", "split")),
    "data.eval.format": Section(FORMATS, "auto", inherits="data.train.format"),
    "optimizer": Section(OPTIMIZERS, "adamw"),
    "optimizer.schedule": Section(SCHEDULES, "constant"),
    "mesh": Section({"": meshes.mesh}),
    "train": Section({"": loop.Train}),
    "eval": Section({"": loop.Eval}),
    "checkpoint": Section({"": loop.Checkpoint}),
}
SCALARS = {"seed": 0}


def resolve(config: Mapping[str, Any]) -> Config:
    """A user's config (a nested dict or a ConfigDict) with every default filled in. ValueError for keys that do not exist."""
    to_dict = getattr(config, "to_dict", None)
    return configs.resolve(SECTIONS, to_dict() if to_dict else config, SCALARS)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its method, on its mesh; no parameter is loaded yet. `layout` gives shape, dtype and sharding of each leaf."""

    source: Source
    method: Method
    network: Network
    mesh: Mesh
    layout: Tree

    def tuned(self, name: str) -> bool:
        return learns(self.source, self.method, name)

    def pace(self, name: str) -> Pace:
        """How fast a leaf learns. What is new starts at once, whatever the method says of its place."""
        return Pace() if is_new(self.source, name) else self.method.pace(name)

    @property
    def reader(self) -> Reader:
        """How examples are laid out for this model and its method."""
        return dataclasses.replace(self.source.reader, slots=self.method.slots)

    def empty_cache(self, batch: int, slots: int):
        return self.source.config.empty_cache(batch, slots, self.method.cuts)


def outline(source: Source) -> Outline:
    """What a method may choose from in this model."""
    words = source.tokenizer
    encode = None if words is None else lambda text: words(text, add_special_tokens=False)["input_ids"]
    return networks.outline(source.config.construct, source.config.layers, encode)


def learns(source: Source, method: Method, name: str) -> bool:
    """Whether a leaf is tuned: because the method says so, or because it is new and means nothing yet."""
    return is_new(source, name) or method.tuned(name)


def is_new(source: Source, name: str) -> bool:
    """Whether a leaf means nothing yet."""
    return name in ADDED or name in source.fresh


def model(source: Source, method: Method, where: Mesh, masters: str = "float32") -> Model:
    """`masters` is the dtype of the leaves that learn; all others have that of the computation. ValueError if nothing would learn."""
    network = networks.build(source.config.construct(method.sites, method.cuts))
    tuned = functools.partial(learns, source, method)
    if not any(map(tuned, tree.flatten(network.abstract))):
        raise ValueError("No leaf of the model would learn under this method.")
    dtype_of = lambda name: masters if tuned(name) else source.config.dtype  # noqa: E731
    layout = state.layout(network.abstract, network.axes, dtype_of, where)
    return Model(source, method, network, where, layout)


def base_params(m: Model, wanted: Callable[[str], bool], seed: int) -> Tree:
    """The wanted leaves as they are before any tuning: read from the checkpoint or, where there is none, initialised."""
    leaves = tree.flatten(m.layout)
    new = {*ADDED, *m.source.fresh}
    published = {n: x for n, x in leaves.items() if m.source.directory and not ("/adapter/" in n or n in new)}
    made = {n: x for n, x in leaves.items() if wanted(n) and n not in published and (m.source.directory is None or n not in ADDED)}
    params = state.fresh(m.network.init, tree.unflatten(made), seed)
    if m.source.directory is not None and any(map(wanted, published)):
        places, dtypes = ({n: getattr(x, what) for n, x in published.items()} for what in ("sharding", "dtype"))
        raw: Any = m.source.published
        inside = tree.unflatten(published), tree.unflatten(places), dtypes.__getitem__, raw
        params = tree.merge(params, checkpoint.load(m.source.directory, *inside, wanted))
    rows = {n: _mean_rows(m, params, n) for n in ADDED if n in leaves and wanted(n) and n not in made}
    return tree.merge(params, tree.unflatten(rows))


def start_params(m: Model, seed: int) -> Tree:
    """All leaves as training starts from them: base, method's start, and the adapter given in model.adapter."""
    params = m.method.start(base_params(m, lambda name: True, seed))
    if m.source.adapter is not None:
        params = with_adapter(m, params, m.source.adapter)
    return params


def with_adapter(m: Model, params: Tree, directory: Path) -> Tree:
    """The parameters with the values of a PEFT directory in the adapter's leaves, and in those of a head that it brings along."""
    saved = adapters.saved(directory, m.source.table)
    wanted = {n: x for n, x in tree.flatten(m.layout).items() if "/adapter/" in n or n in ADDED or n in saved}
    values = tree.flatten(adapters.read(directory, tree.unflatten(wanted), m.source.table))
    placed = {name: jax.device_put(values[name], leaf.sharding) for name, leaf in wanted.items()}
    return tree.unflatten({**tree.flatten(params), **placed})


def _mean_rows(m: Model, params: Tree, name: str) -> jax.Array:
    """New tokens start at the mean of the rows before them (as a sensible direction and length for a token without a meaning yet)."""
    like, first = tree.flatten(m.layout)[name], m.source.config.added[0]

    def rows(leaf):
        known_VD = (leaf if name == "embed/added" else leaf.T)[:first].astype(jnp.float32)
        return jnp.broadcast_to(known_VD.mean(0), like.shape).astype(like.dtype)

    leaf = params["embed"]["table"] if name == "embed/added" else params["head"]["kernel"]
    return jax.jit(rows, out_shardings=like.sharding)(leaf)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run is made of, checked; nothing is compiled and no weight is read yet."""

    config: Config
    model: Model
    loss: Loss
    optimizer: Any
    train: Rows
    eval: Rows | None
    settings: loop.Train
    evaluation: loop.Eval
    checkpoint: loop.Checkpoint


def parts(config: Mapping[str, Any]) -> Parts:
    """The parts of a run. Every mistake in the config is a ValueError here, before any compilation."""
    c = resolve(config)
    bind = functools.partial(configs.bind, SECTIONS, c)
    settings, evaluation, keep = bind("train")(), bind("eval")(), bind("checkpoint")()
    optimizer = bind("optimizer")(bind("optimizer.schedule")(settings.steps))
    where = bind("mesh")()
    loss = bind("objective")()
    source = bind("model")()
    check_objective(source, c["objective"]["name"])
    chosen = bind("method")(outline(source))
    built = model(source, chosen, where)
    optimizer = paced(optimizer, {name: built.pace(name) for name in tree.flatten(built.layout) if built.tuned(name)}, settings.steps)
    if source.adapter is not None:
        _check_adapter(source, source.adapter, c["method"])
    rows = meshes.row_count(where)
    pieces = {"train.batch_size / train.accumulate": settings.batch_size // settings.accumulate, "eval.batch_size": evaluation.batch_size}
    for name, size in pieces.items():
        if size % rows:
            raise ValueError(f"{name}={size} must be a multiple of {rows}, the pieces that the mesh splits a batch into.")
    train = bind("data.train")(built.reader, bind("data.train.format")())
    held_out = bind("data.eval")(built.reader, bind("data.eval.format")()) if given(c["data"]["eval"]["path"]) else None
    for name, data in (("data.train", train), ("data.eval", held_out)):
        if data is not None and data.length > (room := source.config.max_length - chosen.sites.offset):
            raise ValueError(f"{name}.length={data.length} is more than the {room} positions that the model was made for.")
    return Parts(c, built, loss, optimizer, train, held_out, settings, evaluation, keep)


def check_objective(source: Source, name: str) -> None:
    """ValueError if the objective is not for the model's head."""
    output = source.config.head.output
    if output not in ("vocabulary", "classes"):
        raise ValueError(f"A head over {output} has nothing to lower. Set model.head to another one.")
    wanted = {"vocabulary": "next_token", "classes": "labels"}[output]
    if name != wanted:
        raise ValueError(f"objective.name={name!r} is not for a head over {output}. Set --config.objective.name={wanted}, or model.head.")


def given(value: Any) -> bool:
    """Whether a required key was set."""
    return value is not None and not isinstance(value, configs.Required)


def _check_adapter(source: Source, directory: Path, method: Config) -> None:
    """ValueError if the method is not the one that the adapter's values belong to (its targets are checked when it is read), or if it
    brings along a head that would not learn."""
    has, _, saved = adapters.settings(directory, source.table, outline(source))
    if has["name"] == "lora":
        has["init"] = "default"  # the values are changes of the published kernels, which some inits replace
    same = [key for key in has if key not in ("targets", "dropout")]
    if any(configs.plain(method.get(key)) != configs.plain(has[key]) for key in same):
        wanted = " ".join(f"--config.method.{key}={has[key]}" for key in same)
        raise ValueError(f"model.adapter={directory} was made by another method. To go on with it: {wanted}.")
    if frozen := sorted(set(saved) - source.fresh):
        raise ValueError(
            f"model.adapter={directory} brings along {', '.join(frozen)}, which learn in a new head only. Load a base without a head, and "
            "set model.head and model.classes."
        )
