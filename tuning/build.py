"""From a config to the parts of a run; the only file that sees every part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.config import Config, Section
from tuning.core.types import Batch, Loss, Tree
from tuning.data.dataset import Rows, at_first, blank, dataset, unslotted
from tuning.data.formats import FORMATS
from tuning.data.mixture import Mixture, replay
from tuning.data.reader import Reader
from tuning.hub import adapters
from tuning.methods import METHODS
from tuning.methods.method import Method, Pace, added
from tuning.models import network as networks
from tuning.models.network import Network
from tuning.nn.sites import NOTHING, Outline, Sites
from tuning.objectives import OBJECTIVES
from tuning.source import SOURCES, Source
from tuning.training import loop, state, step
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, paced
from tuning.training.step import Apply
from tuning.training.writer import Log

ADDED = ("embed/added", "head/added")  # rows of added tokens: they learn under every method
READ = ("path", "subset", "split", "columns", "sample_by")  # what of a data set is its own, if it is another text

SECTIONS: dict[str, Section] = {
    "model": Section(SOURCES, "pretrained"),
    "method": Section(METHODS, "lora"),
    "objective": Section(OBJECTIVES, "next_token"),
    "data.train": Section({"": dataset}),
    "data.train.format": Section(FORMATS, "auto"),
    "data.eval": Section({"": dataset}, inherits="data.train", own=("path", "split")),
    "data.eval.format": Section(FORMATS, "auto", inherits="data.train.format"),
    "data.replay": Section({"": replay}, inherits="data.train", own=(*READ, "length", "input_length")),
    "data.replay.format": Section(FORMATS, "auto"),
    "data.kept": Section({"": dataset}, inherits="data.train", own=READ),
    "data.kept.format": Section(FORMATS, "auto", inherits="data.replay.format"),
    "optimizer": Section(OPTIMIZERS, "adamw"),
    "optimizer.schedule": Section(SCHEDULES, "constant"),
    "mesh": Section({"": meshes.mesh}),
    "train": Section({"": loop.Train}),
    "eval": Section({"": loop.Eval}),
    "checkpoint": Section({"": loop.Checkpoint}),
    "log": Section({"": Log}),
}
SCALARS = {"seed": 0}


def resolve(config: Mapping[str, Any]) -> Config:
    """A user's config (a nested dict or a ConfigDict) with every default filled in. ValueError for keys that do not exist."""
    to_dict = getattr(config, "to_dict", None)
    return configs.resolve(SECTIONS, to_dict() if to_dict else config, SCALARS)


def revived(plain: Mapping[str, Any]) -> Config:
    """A whole config as it was before it was written as JSON: lists become tuples again where the key's values are tuples."""
    config = resolve(plain)
    for key, kind in configs.kinds(SECTIONS, config).items():
        value = configs.dig(config, key)
        if kind is tuple and isinstance(value, list):
            configs.put(config, key, tuple(value))
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            configs.put(config, key, float(value))
    return config


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
        """How fast a leaf learns. What is new starts at once, whatever the method says of its place; rates by rule are for all."""
        factor = next((factor for pattern, factor in self.method.rates if tree.matches(pattern, name)), 1.0)
        return (Pace() if is_new(self.source, name) else self.method.pace(name)).times(factor)

    def moves(self, name: str) -> bool:
        """Whether training changes a leaf. Others may be tuned too, at rate 0: those that a checkpoint must hold."""
        return self.tuned(name) and np.max(self.pace(name).rate) > 0

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


def model(source: Source, method: Method, where: Mesh, masters: str = "float32", network: Network | None = None) -> Model:
    """`masters` is the dtype of the leaves that learn; all others have that of the computation. `network` is theirs, if it is there."""
    if where.shape["context"] > 1 and not attention(source, method, where)[0]:
        raise ValueError(
            f"mesh.context={where.shape['context']} splits sequences, and a recurrent network reads one token after another. Set it to 1."
        )
    network = network or _network(source, method, where, method.sites)
    tuned = functools.partial(learns, source, method)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(network.abstract).items()}
    for pattern, _ in method.rates:
        if not any(tree.matches(pattern, name) for name in shapes if tuned(name)):
            raise ValueError(
                f"method.rates: {pattern!r} matches no leaf that learns. There are: {tree.listing(filter(tuned, shapes), 40)}."
            )
    dtype_of = lambda name: masters if tuned(name) else source.config.dtype  # noqa: E731
    storage = source.storage.choose({n: shape for n, shape in shapes.items() if not tuned(n)}) if source.storage else {}
    if method.residual and not storage:
        raise ValueError("method.init='loftq' starts from what quantising takes away, and nothing is quantised. Set model.quantise=nf4.")
    layout = state.layout(network.abstract, network.axes, dtype_of, where, storage.get)
    return Model(source, method, network, where, layout)


def attention(source: Source, method: Method, where: Mesh, length: int | None = None) -> tuple[str, str]:
    """(the form of attention on a mesh, in sequences of a length, why it is not the one that was asked for)."""
    length = length and length // where.shape["context"]
    return source.config.attention_on(meshes.device(where).platform, source.attention, method.sites.offset, length)


def _network(source: Source, method: Method, where: Mesh, sites: Sites) -> Network:
    form, _ = attention(source, method, where)
    config = source.config.replace(attention=form) if form else source.config
    return networks.build(config.construct(sites, method.cuts))


def base(m: Model) -> Apply:
    """(parameters, batch) -> hidden, head and measures of the model without its method, without dropout.

    It reads the examples without the positions that the method keeps free, and the leaves that the method did not add; at each place of the
    batch stands what is said there.
    """
    network, slots = _network(m.source, m.method, m.mesh, NOTHING), m.method.slots
    moved = slots if slots and at_first(m.reader) else 0

    def apply(params: Tree, batch: Batch, key: jax.Array | None = None):
        own, _ = tree.split(params, lambda name: not added(name))
        hidden_BTD, head, measures = network.apply(own, unslotted(batch, slots) if slots else batch)
        return jnp.roll(hidden_BTD, -moved, axis=1) if moved else hidden_BTD, head, measures

    return apply


def base_leaves(m: Model) -> list[str]:
    """The names of the base's leaves that learn."""
    return [name for name in tree.flatten(m.layout) if m.tuned(name) and not added(name)]


def compared(m: Model, objective: Config) -> Apply | None:
    """The base, if the objective compares with it. ValueError if the parameters do not hold it any more once they are tuned."""
    if not objective["base_kl"]:
        return None
    if learning := base_leaves(m):
        raise ValueError(
            f"objective.base_kl={objective['base_kl']} compares with the base, of which {tree.listing(learning, 2)} learn. Set it to 0, or "
            "take a method that changes no weight of the base (lora, prefix, ...), no new head and no added tokens."
        )
    return base(m)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a run is made of, checked; nothing is compiled and no weight is read yet.

    mixture  the rows of `train` among those of data.replay, or None without it
    kept     of what the model knew; evaluated with `eval`
    base     the model before it is tuned, for an objective that compares with it
    """

    config: Config
    model: Model
    loss: Loss
    optimizer: Any
    train: Rows
    mixture: Mixture | None
    eval: Rows | None
    kept: Rows | None
    base: Apply | None
    settings: loop.Train
    evaluation: loop.Eval
    checkpoint: loop.Checkpoint
    log: Log

    @property
    def held_out(self) -> dict[str, Rows]:
        """What is evaluated, by name."""
        return {name: rows for name, rows in (("eval", self.eval), ("kept", self.kept)) if rows is not None}

    def train_step(self, seed: int | jax.Array, transform: Any = None, apply: Apply | None = None) -> Callable:
        """(state, batch) -> (state after one update, measures), as training.step has it; `transform` and `apply`, if given, stand in the
        optimizer's and the network's place."""
        settings, optimizer = self.settings, self.optimizer
        return step.train_step(
            apply or self.model.network.apply, self.loss, transform or optimizer.transform, accumulate=settings.accumulate,
            clip_norm=settings.clip_norm, seed=seed, begun=optimizer.begun, penalty=self.model.method.penalty, base=self.base,
        )  # fmt: skip

    @property
    def sources(self) -> list[tuple[str, Rows, float]]:
        """(name, rows, share of the rows that are trained on) of what is trained on."""
        if self.mixture is None:
            return [("train", self.train, 1.0)]
        return [("train", self.train, 1 - self.mixture.share), ("replay", self.mixture.other, self.mixture.share)]


def parts(config: Mapping[str, Any], like: Parts | None = None, sketch: meshes.Devices | None = None) -> Parts:
    """The parts of a run. Every mistake in the config is a ValueError here, before any compilation.

    like    another run: what it has read and built already is taken over where the two configs say the same
    sketch  devices that need not be here (see meshes.over), for a plan: of the model config.json alone is read, and rows count as full
    """
    c = resolve(config)
    same = lambda *keys: like is not None and all(configs.plain(c[key]) == configs.plain(like.config[key]) for key in keys)  # noqa: E731
    bind = functools.partial(configs.bind, SECTIONS, c)
    settings, evaluation, keep, log = bind("train")(), bind("eval")(), bind("checkpoint")(), bind("log")()
    bind("optimizer")(bind("optimizer.schedule")(settings.steps))  # a mistake there is found before any file is read
    where = bind("mesh")(sketch)
    loss = bind("objective")()
    described = [True] if sketch is not None and c["model"]["name"] == "pretrained" else []
    source = like.model.source if like is not None and same("model") else bind("model")(*described)
    check_objective(source, c["objective"]["name"])
    if like is not None and same("model", "method"):
        known = like.model
        built = known if where == known.mesh else model(source, known.method, where, network=known.network)
    else:
        built = model(source, bind("method")(outline(source)), where)
    if not any(map(built.tuned, tree.flatten(built.layout))):
        raise ValueError("No leaf of the model would learn under this method.")
    optimizer = optimized(c, built)
    if source.adapter is not None:
        _check_adapter(built, source.adapter, c["method"])
    rows = meshes.row_count(where)
    pieces = {"train.batch_size / train.accumulate": settings.batch_size // settings.accumulate, "eval.batch_size": evaluation.batch_size}
    for name, size in pieces.items():
        if size % rows:
            raise ValueError(f"{name}={size} must be a multiple of {rows}, the pieces that the mesh splits a batch into.")
    if sketch is not None:
        read = _blank(c["data"]["train"], built), None, None, None
    elif like is not None and same("model", "mesh", "data") and built.reader == like.model.reader:
        read = like.train, like.mixture, like.eval, like.kept
    else:
        read = _read(c, built)
    for name, data in zip(("data.train", "data.eval", "data.kept"), (read[0], *read[2:]), strict=True):
        for key, size in (("length", data.length), ("input_length", data.input_length)) if data is not None else ():
            if size % (pieces := where.shape["context"]):
                raise ValueError(f"{name}.{key}={size} must be a multiple of mesh.context={pieces}, which splits each sequence.")
        if data is not None and data.length > (room := source.config.max_length - built.method.sites.offset):
            raise ValueError(f"{name}.length={data.length} is more than the {room} positions that the model was made for.")
    if source.attention != "auto" and (why := attention(source, built.method, where, read[0].length)[1]):
        raise ValueError(f"model.attention={source.attention!r} cannot be had. {why}. Set it to auto, which takes another form there.")
    return Parts(c, built, loss, optimizer, *read, compared(built, c["objective"]), settings, evaluation, keep, log)


def optimized(c: Config, m: Model, rates: Mapping[str, Any] | None = None) -> Optimizer:
    """The optimizer of a resolved config for this model's leaves; `rates` has those of some leaves' paces, in the method's place."""
    bind, steps = functools.partial(configs.bind, SECTIONS, c), c["train"]["steps"]
    paces = {name: m.pace(name) for name in tree.flatten(m.layout) if m.tuned(name)}
    paces |= {name: paces[name]._replace(rate=rate) for name, rate in (rates or {}).items()}
    made = paced(bind("optimizer")(bind("optimizer.schedule")(steps)), paces, steps)
    return dataclasses.replace(made, around=m.method.around(steps))


def _read(c: Config, m: Model) -> tuple[Rows, Mixture | None, Rows | None, Rows | None]:
    """What is trained on, that among what is replayed, and what is held out of the two."""
    bind = functools.partial(configs.bind, SECTIONS, c)
    train = bind("data.train")(m.reader, bind("data.train.format")())
    there = lambda name: given(configs.dig(c, f"data.{name}.path"))  # noqa: E731
    if given(c["data"]["replay"]["share"]) and not there("replay"):
        raise ValueError(f"data.replay.share={c['data']['replay']['share']}, but of which text? Set data.replay.path.")
    if there("kept") and not there("eval"):
        raise ValueError("data.kept is evaluated along with data.eval, which has no path. Set data.eval.path too.")
    mixture = bind("data.replay")(m.reader, bind("data.replay.format")(), train) if there("replay") else None
    held_out, kept = (bind(f"data.{n}")(m.reader, bind(f"data.{n}.format")()) if there(n) else None for n in ("eval", "kept"))
    return train, mixture, held_out, kept


def _blank(train: Config, m: Model) -> Rows:
    """A full row of what the config says of data.train, without any text."""
    has = m.source.config
    encoder = (train["input_length"] or train["length"]) if has.reads == "encoder_decoder" else 0
    return blank(train["length"], encoder, types=getattr(has, "type_count", 0) > 1)


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


def _check_adapter(m: Model, directory: Path, method: Config) -> None:
    """ValueError if the method is not the one that the adapter's values belong to (its targets are checked when it is read), or if it
    brings along weights that would not learn."""
    has, _, saved = adapters.settings(directory, m.source.table, outline(m.source))
    if has["name"] == "lora":
        has["init"] = "default"  # the values are changes of the published kernels, which some inits replace
    same = [key for key in has if key not in ("targets", "dropout", "also", "leaves")]
    if any(configs.plain(method.get(key)) != configs.plain(has[key]) for key in same):
        wanted = " ".join(f"--config.method.{key}={has[key]}" for key in same)
        raise ValueError(f"model.adapter={directory} was made by another method. To go on with it: {wanted}.")
    if frozen := [leaf for leaf in saved if not m.tuned(leaf)]:
        wanted = f"leaves={has['leaves']}" if "leaves" in has else f"also={','.join(has['also'])}"
        raise ValueError(f"model.adapter={directory} brings along {tree.listing(frozen)}, which learned beside it. To go on with them: "
                         f"--config.method.{wanted}.")  # fmt: skip
