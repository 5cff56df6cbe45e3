"""Optimizers and learning-rate schedules: two tables of parts, made of optax transformations.

All of them lower a leaf by `learning_rate * schedule(count) * (direction + weight_decay * leaf)`, where count is the number of updates
made before: decay is decoupled (Loshchilov and Hutter, 2019, arXiv:1711.05101), and the first update uses schedule(0), which under
warm-up is 0. Directions and moments are computed in float32, whatever the dtype of the leaves.

Rates, decays and what a schedule is made of may be traced arrays, so that runs which differ in them share one program. Traced numbers are
not checked: whoever traces them has checked each as a number before. A traced weight decay is not 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import Pace, Wrap

Schedule = Callable[[Any], jax.Array]  # number of updates made, int or traced int32 -> multiplier in [0, 1], float32

# Matrices decay: projections, adapter factors, the embedding. Norms, biases and added rows do not.
DECAY = r"kernel(_\d)?$|table$|/(a|b|w[12](_[ab])?)$|/adapter/(down|up)$"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer as a value.

    direction      gradients -> directions; the only part whose state depends on how long a leaf has learned
    pull           adds weight decay to the directions
    learning_rate  number of updates made -> the rate of the next one
    begun          (gradients, number of updates made) -> the gradients, 0 where a leaf does not learn yet
    around         the whole transformation -> the one that is used
    """

    direction: optax.GradientTransformation
    pull: optax.GradientTransformation
    learning_rate: Schedule
    begun: Callable[[Tree, Any], Tree] = lambda gradients, count: gradients
    around: Wrap = lambda transform: transform

    @property
    def transform(self) -> optax.GradientTransformation:
        """The whole of it, over the nested dict of the leaves that learn."""
        return self.around(_in_float32(optax.chain(self.direction, self.pull, optax.scale_by_learning_rate(self.learning_rate))))


# Schedules. `steps` is the length of the run, in updates; at and after `steps` the multiplier is `final`.


def constant(steps: int, *, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0, then 1."""
    return _after_warmup(steps, warmup_steps, lambda count: jnp.ones_like(count))


def linear(steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0, then a straight line down to `final`."""
    return _after_warmup(steps, warmup_steps, lambda count: 1 - (1 - final) * _part(count, warmup_steps, steps), final)


def cosine(steps: int, *, warmup_steps: int = 0, final: float = 0.1) -> Schedule:
    """Linear warm-up from 0, then half a cosine wave down to `final` (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""
    wave = lambda count: (1 + jnp.cos(jnp.pi * _part(count, warmup_steps, steps))) / 2  # noqa: E731
    return _after_warmup(steps, warmup_steps, lambda count: final + (1 - final) * wave(count), final)


def wsd(steps: int, *, warmup_steps: int = 0, decay_steps: int | None = None, final: float = 0.0) -> Schedule:
    """Warm-up, stable at 1, and a straight line down to `final` in the last `decay_steps`; None is a tenth of the run.

    Hu et al., 2024, arXiv:2404.06395; the shape of the decay: Hägele et al., 2024, arXiv:2405.18392.
    """
    decay_steps = max(1, steps // 10) if decay_steps is None else decay_steps
    if not _traced(warmup_steps, decay_steps) and (decay_steps < 1 or warmup_steps + decay_steps > steps):
        raise ValueError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} do not fit into a run of {steps} steps; lower one of them."
        )
    return _after_warmup(steps, warmup_steps, lambda count: 1 - (1 - final) * _part(count, steps - decay_steps, steps), final)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def _traced(*values: Any) -> bool:
    return any(isinstance(value, jax.Array) for value in values)


def _part(count: jax.Array, start: int, stop: int) -> jax.Array:
    """How far count has come from start to stop, from 0 to 1."""
    return jnp.clip((count - start) / (stop - start), 0.0, 1.0)


def _after_warmup(steps: int, warmup_steps: int, then: Callable[[jax.Array], jax.Array], final: float = 1.0) -> Schedule:
    if not _traced(warmup_steps) and not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps={warmup_steps} does not fit into a run of {steps} steps; it is at least 0 and less than that.")
    if not _traced(final) and not 0 <= final <= 1:
        raise ValueError(f"final={final} is a multiplier of the learning rate, between 0 and 1.")

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        return jnp.where(count < warmup_steps, count / jnp.maximum(warmup_steps, 1), then(count))

    return schedule


# Optimizers. The learning rates suit adapters; tuning all weights of a large model takes about a tenth of them.


def adamw(
    schedule: Schedule,
    *,
    learning_rate: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = DECAY,
) -> Optimizer:
    """Adam with decoupled weight decay, on the leaves whose name the regular expression `decay` matches (arXiv:1711.05101)."""
    return _optimizer(optax.scale_by_adam(b1, b2, eps), schedule, learning_rate, weight_decay, decay)


def adafactor(
    schedule: Schedule,
    *,
    learning_rate: float = 1e-4,  # steps are of Adam's size, since clipping holds their root mean square at 1
    decay_rate: float = 0.8,
    clip: float = 1.0,
    scale_by_parameter: bool = False,  # True is the paper's choice, with rates about 1e-2: steps relative to the leaf's size
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    decay: str = DECAY,
) -> Optimizer:
    """Adam's second moment as a row and a column for matrices of 128 or more both ways; no first moment (arXiv:1804.04235).

    The layers of a stacked leaf are clipped together.
    """
    scale = optax.scale_by_param_block_rms() if scale_by_parameter else optax.identity()
    moments = optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=eps)
    return _optimizer(optax.chain(moments, optax.clip_by_block_rms(clip), scale), schedule, learning_rate, weight_decay, decay)


def sgd(
    schedule: Schedule,
    *,
    learning_rate: float = 1e-2,  # steps are of the gradient's size, which is small
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: str = DECAY,
) -> Optimizer:
    """Stochastic gradient descent with momentum; momentum 0 keeps no state."""
    direction = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return _optimizer(direction, schedule, learning_rate, weight_decay, decay)


def lion(
    schedule: Schedule,
    *,
    learning_rate: float = 1e-5,  # a tenth of Adam's: every element moves by the full rate; weight_decay is ten times Adam's then
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    decay: str = DECAY,
) -> Optimizer:
    """The sign of an interpolated momentum; one moment instead of two (Chen et al., 2023, arXiv:2302.06675)."""
    return _optimizer(optax.scale_by_lion(b1, b2), schedule, learning_rate, weight_decay, decay)


def muon(
    schedule: Schedule,
    *,
    learning_rate: float = 1e-4,  # Adam's, to whose size the orthogonal steps are scaled
    matrices: str = r"^blocks/.*(kernel|/a|/b)$",
    beta: float = 0.95,
    newton_schulz_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = DECAY,
) -> Optimizer:
    """Orthogonalised momentum for the leaves that `matrices` matches, layer by layer, and Adam for all others.

    Jordan, 2024 (https://kellerjordan.github.io/posts/muon); the scale 0.2 sqrt(max(in, out)): Liu et al., 2025, arXiv:2502.16982.
    """

    def labels(leaves: Tree) -> Tree:
        return tree.map_named(lambda name, leaf: "muon" if leaf.ndim >= 2 and tree.matches(matrices, name) else "adam", leaves)

    def axes(leaves: Any) -> Any:  # every axis before the last two is a batch of matrices
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), leaves)

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(ns_steps=newton_schulz_steps, beta=beta, eps=eps, weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(lambda x: x * (0.2 * max(x.shape[-2:]) ** 0.5), updates)),
    )
    direction = optax.partition({"muon": orthogonal, "adam": optax.scale_by_adam(b1, b2, eps)}, labels)
    return _optimizer(direction, schedule, learning_rate, weight_decay, decay)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "sgd": sgd, "lion": lion, "muon": muon}


def _optimizer(
    direction: optax.GradientTransformation, schedule: Schedule, learning_rate: float, weight_decay: float, decay: str
) -> Optimizer:
    if not _traced(learning_rate, weight_decay) and (learning_rate < 0 or weight_decay < 0):
        raise ValueError(f"learning_rate={learning_rate} and weight_decay={weight_decay} may not be negative.")

    def decays(leaves: Tree) -> Tree:
        chosen = tree.map_named(lambda name, _: tree.matches(decay, name), leaves)
        if not any(jax.tree.leaves(chosen)):
            names = tree.listing(tree.flatten(leaves))
            raise ValueError(f"weight_decay={weight_decay}, but decay={decay!r} matches none of the leaves that learn: {names}.")
        return chosen

    def rate(count: Any) -> jax.Array:
        return learning_rate * schedule(count)

    pull = optax.add_decayed_weights(weight_decay, decays) if _traced(weight_decay) or weight_decay else optax.identity()
    return Optimizer(direction, pull, rate)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation with float32 state and updates for leaves and gradients of any float dtype."""

    def cast(leaves: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), leaves)

    def init(params):
        return inner.init(cast(params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("The optimizer needs the leaves as well as their gradients: transform.update(gradients, state, leaves).")
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init, update)


# Leaves that learn at a pace of their own.


class Paced(NamedTuple):
    """The state of a paced optimizer.

    count   updates made
    groups  {number: state of `direction` for the leaves that begin together; for each layer, where a leaf's layers do not}
    pull    that of the weight decay
    """

    count: Any
    groups: dict[str, Any]
    pull: Any


def paced(optimizer: Optimizer, paces: Mapping[str, Pace], steps: int) -> Optimizer:
    """The optimizer with each leaf, and each layer of a stacked leaf, at its pace; the same optimizer where all paces are the default.

    What begins at a step is optimised from there on as if the run began there, at the rate that the schedule has then: until then
    neither it nor its part of the state changes. A leaf whose layers begin apart is optimised layer by layer; one of rate 0 has no state.
    `paces` names the leaves that learn. A rate may be a traced array, one number or one for each layer, that is not 0. ValueError where a
    leaf would begin only after the `steps` of the run.
    """
    paces = {name: Pace(_even(rate), _even(begin)) for name, (rate, begin) in paces.items()}
    if all(is_usual(pace) for pace in paces.values()):
        return optimizer
    for name, pace in paces.items():
        if (last := max(np.atleast_1d(pace.begin))) >= steps:
            raise ValueError(
                f"{name} would learn from step {last} on only, and train.steps={steps}. Raise train.steps, or lower method.unfreeze_every."
            )
    groups: dict[Any, list[str]] = {}
    moving = [name for name, pace in paces.items() if _traced(pace.rate) or np.max(pace.rate) > 0]
    for name in moving:
        groups.setdefault(paces[name].begin, []).append(name)

    def begun(gradients: Tree, count: Any) -> Tree:
        return tree.map_named(lambda name, x: jnp.where(_along(count >= np.asarray(paces[name].begin), x), x, 0), gradients)

    def init(params: Tree) -> Paced:
        parts = {str(i): _each(optimizer.direction.init, begin)(_only(params, names)) for i, (begin, names) in enumerate(groups.items())}
        return Paced(jnp.zeros((), jnp.int32), parts, optimizer.pull.init(_only(params, moving)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Tree, Paced]:
        found, parts = [], {}
        for i, (begin, names) in enumerate(groups.items()):
            old, now = state.groups[str(i)], state.count >= np.asarray(begin)
            part, new = _each(optimizer.direction.update, begin)(_only(updates, names), old, _only(params, names))
            parts[str(i)] = jax.tree.map(lambda new, old, now=now: jnp.where(_along(now, new), new, old), new, old)
            found.append(part)
        directions, pull = optimizer.pull.update(tree.merge(*found), state.pull, _only(params, moving))
        moves = tree.map_named(lambda name, x: x * _along(jnp.asarray(paces[name].rate, x.dtype), x), directions)
        updates = tree.unflatten({**tree.flatten(jax.tree.map(jnp.zeros_like, updates)), **tree.flatten(moves)})
        return begun(updates, state.count), Paced(state.count + 1, parts, pull)

    return Optimizer(optax.GradientTransformation(init, update), optax.identity(), optimizer.learning_rate, begun)


def is_usual(pace: Pace) -> bool:
    """Whether a leaf of this pace learns as it does where nothing is said of paces."""
    return not _traced(pace.rate) and Pace(_even(pace.rate), _even(pace.begin)) == Pace()


def _even(values: Any) -> Any:
    """The number that all layers share, or the tuple where they do not."""
    several = isinstance(values, tuple)
    return values[0] if several and len(set(values)) == 1 else values


def _each(function: Callable, begin: Any) -> Callable:
    """The function, or the same for each layer."""
    return jax.vmap(function) if isinstance(begin, tuple) else function


def _only(leaves: Tree, names: list[str]) -> Tree:
    flat = tree.flatten(leaves)
    return tree.unflatten({name: flat[name] for name in names})


def _along(values: jax.Array, like: jax.Array) -> jax.Array:
    """A scalar, or one value for each layer as an array of like's rank that varies along the first axis only."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values


def shardings(state: Any, tuned: Tree, tuned_shardings: Tree, replicated: Any) -> Any:
    """A sharding for every leaf of an abstract optax state.

    A leaf whose path ends with the name of a tuned leaf, and which has its shape, lives where that leaf lives; the others (counters,
    Adafactor's rows and columns) are replicated.
    """
    homes = tree.flatten(tuned_shardings)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(tuned).items()}

    def home(path: tuple, leaf: Any) -> Any:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((end for end in ends if end in shapes), None)
        return homes[name] if name is not None and shapes[name] == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(home, state)
