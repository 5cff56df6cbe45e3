"""Recurrent layers over packed rows: LSTM and GRU, forward and backward in time.

Arithmetic and the order of the gates are those of torch.nn.LSTM (Hochreiter and Schmidhuber, 1997, Neural Computation 9) and
torch.nn.GRU (Cho et al., 2014, arXiv:1406.1078, with the reset gate behind the product).
Shapes: B sequences, T tokens, D input width, H state width, G gates times H.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.nn.dropout import dropout
from tuning.nn.linear import Linear
from tuning.nn.sites import Site, Sites
from tuning.nn.stack import REMAT

State = tuple[jax.Array, ...]  # (hidden_BH, cell_BH) of an LSTM, (hidden_BH,) of a GRU; float32 in every dtype of the computation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """What a network that reads forward remembers of what it has read.

    states   {name of a layer: its State}
    segment  [B] int32, the segment of the last token; 0 before the first
    """

    states: dict[str, State]
    segment: Any


class Marks(NamedTuple):
    """Where the state begins anew, and where there is a token to read; [B, T, 1] bool."""

    fresh: jax.Array
    real: jax.Array


def marks(segments_BT: jax.Array, before_B: jax.Array, reverse: bool = False) -> tuple[Marks, jax.Array]:
    """The marks of one direction, and the segment of the last token read; `before_B` is that of the last token before these.

    A token of another segment than the token read before it begins anew; padding between them is passed over.
    """
    order_BT = segments_BT[:, ::-1] if reverse else segments_BT
    known_BT = jnp.concatenate([before_B[:, None], order_BT], axis=1)
    last_BT = jax.lax.associative_scan(lambda a, b: jnp.where(b == 0, a, b), known_BT, axis=1)
    fresh_BT = (order_BT != 0) & (order_BT != last_BT[:, :-1])
    fresh_BT = fresh_BT[:, ::-1] if reverse else fresh_BT
    return Marks(fresh_BT[..., None], (segments_BT != 0)[..., None]), last_BT[:, -1]


def _lstm(gates: jax.Array, product: jax.Array, state: State) -> State:
    i, f, g, o = jnp.split(gates + product, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def _gru(gates: jax.Array, product: jax.Array, state: State) -> State:
    (r, z, n), (from_r, from_z, from_n) = jnp.split(gates, 3, axis=-1), jnp.split(product, 3, axis=-1)
    z = jax.nn.sigmoid(z + from_z)
    return ((1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + from_r) * from_n) + z * state[0],)


class Cell(NamedTuple):
    """gates: how many; states: arrays in its State; next(gates [B, G] of the token, product [B, G] of the state, state) -> state."""

    gates: int
    states: int
    next: Callable[[jax.Array, jax.Array, State], State]


CELLS = {"lstm": Cell(4, 2, _lstm), "gru": Cell(3, 1, _gru)}


def names(layers: int) -> tuple[str, ...]:
    """What the layers are called: each is a segment of its own, since layers differ in the width that they read."""
    return tuple(f"{i}-{i}" for i in range(layers))


def empty(cell: str, batch: int, hidden: int, layers: int) -> RecurrentCache:
    """A cache of nothing: the states before the first token."""
    zeros_BH = mesh.constrain(jnp.zeros((batch, hidden), jnp.float32), "batch", None)
    return RecurrentCache({name: (zeros_BH,) * CELLS[cell].states for name in names(layers)}, jnp.zeros(batch, jnp.int32))


class How(NamedTuple):
    """What is static in a pass over time. graph: of the projection of the state, whose weights travel apart from it."""

    cell: str
    graph: Any
    precision: str
    reverse: bool

    def project(self, weights: Any, hidden: jax.Array, key: jax.Array | None) -> jax.Array:
        return nnx.merge(self.graph, weights)(hidden, key)  # pyright: ignore[reportCallIssue]

    def after(self, gates: jax.Array, product: jax.Array, before: State, real: jax.Array) -> State:
        """The state behind a token; padding leaves it as it was."""
        new = CELLS[self.cell].next(gates.astype(jnp.float32), product.astype(jnp.float32), before)
        return tuple(jnp.where(real, n, b) for n, b in zip(new, before, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recur(how: How, weights: Any, gates_BTG: jax.Array, where: Marks, start: State, keys_T: jax.Array | None) -> tuple[jax.Array, State]:
    """(hidden states [B, T, H], 0 at padding; the last state) from what the tokens send to the gates.

    The loop holds the state's product and nothing else of weight. Going back, the gradient of the weights is one product over all times
    after the loop: kept inside, it would be added up, and over devices reduced, once for each token.
    """
    return _recur(how, weights, gates_BTG, where, start, keys_T)[0]


def _recur(how: How, weights, gates_BTG, where, start, keys_T):
    def step(state, now):
        gates, (fresh, real), key = now
        before = _reset(state, fresh)
        product = how.project(weights, before[0].astype(gates.dtype), key)
        after = how.after(gates, product, before, real)
        return after, (jnp.where(real, after[0], 0).astype(gates.dtype), before, product)

    with jax.default_matmul_precision(how.precision):
        over = (*_swap((gates_BTG, where)), keys_T)
        last, (y_TBH, *kept) = jax.lax.scan(step, start, over, reverse=how.reverse)
    return (_swap(y_TBH), last), (weights, over, kept)


def _recur_backward(how: How, kept, cotangents):
    weights, over, (before, product_TBG) = kept
    dy_BTH, d_last = cotangents

    def step(d_after, now):
        (gates, (fresh, real), key), before, product, dy = now
        d_after = (d_after[0] + jnp.where(real, dy, 0).astype(jnp.float32), *d_after[1:])
        _, pull = jax.vjp(functools.partial(how.after, real=real), gates, product, before)
        d_gates, d_product, d_before = pull(d_after)
        _, pull = jax.vjp(lambda hidden: how.project(weights, hidden, key), before[0].astype(gates.dtype))
        d_before = (d_before[0] + pull(d_product)[0].astype(jnp.float32), *d_before[1:])
        return _reset(d_before, fresh), (d_gates, d_product)

    def products(weights):
        # Sequences first: a product over (T, B) flattened would leave devices no axis to divide.
        hidden_BTH, keys_T = _swap(before[0]).astype(product_TBG.dtype), over[-1]
        if keys_T is None:
            return how.project(weights, hidden_BTH, None)
        return jax.vmap(functools.partial(how.project, weights), in_axes=(1, 0), out_axes=1)(hidden_BTH, keys_T)

    with jax.default_matmul_precision(how.precision):
        every = (over, before, product_TBG, _swap(dy_BTH))
        d_start, (d_gates_TBG, d_product_TBG) = jax.lax.scan(step, d_last, every, reverse=not how.reverse)
        (d_weights,) = jax.vjp(products, weights)[1](_swap(d_product_TBG))
    return d_weights, _swap(d_gates_TBG), None, d_start, None


recur.defvjp(_recur, _recur_backward)


def _swap(arrays: Any) -> Any:
    """Between [B, T, ...] and [T, B, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), arrays)


def _reset(state: State, fresh: jax.Array) -> State:
    return tuple(jnp.where(fresh, 0, x) for x in state)


class Direction(nnx.Module):
    """One direction of a layer; its leaves are torch's weight_ih and bias_ih (input), weight_hh and bias_hh (state)."""

    def __init__(self, cell: str, width: int, hidden: int, role: str, *, layers: range, precision: str, sites: Sites, rngs: nnx.Rngs):
        gates = CELLS[cell].gates * hidden
        # The gates stay whole on every device: they lie behind one another, so a split would part the gates of a unit.
        site = lambda part, size: Site(f"{role}/{part}", (size, gates), ("embed", "gates"), layers)  # noqa: E731
        self.input = Linear(site("input", width), sites, rngs, bias=True)
        self.state = Linear(site("state", hidden), sites, rngs, bias=True)
        self.cell, self.role, self.precision = cell, role, precision

    def __call__(self, x_BTD: jax.Array, where: Marks, key: jax.Array | None, start: State) -> tuple[jax.Array, State]:
        gates_BTG = self.input(x_BTD, keys.fold(key, f"{self.role}/input"))
        key = None if self.state.adapter is None else keys.fold(key, f"{self.role}/state")  # only an adapter draws at random
        keys_T = None if key is None else jax.random.split(key, x_BTD.shape[1])
        graph, weights = nnx.split(self.state)
        return recur(How(self.cell, graph, self.precision, self.role == "backward"), weights, gates_BTG, where, start, keys_T)


class Layer(nnx.Module):
    """One direction, or both with their states side by side."""

    def __init__(
        self, cell: str, bidirectional: bool, width: int, hidden: int, layers: range, precision: str, sites: Sites, rngs: nnx.Rngs
    ):
        make = functools.partial(Direction, cell, width, hidden, layers=layers, precision=precision, sites=sites, rngs=rngs)
        self.forward = make("forward")
        self.backward = make("backward") if bidirectional else None

    def __call__(self, x_BTD: jax.Array, ways: dict[str, Marks], key: jax.Array | None, start: State) -> tuple[jax.Array, State]:
        """(states [B, T, H] or [B, T, 2 H], the last one read forward)"""
        y_BTH, last = self.forward(x_BTD, ways["forward"], key, start)
        if self.backward is None:
            return y_BTH, last
        back_BTH, _ = self.backward(x_BTD, ways["backward"], key, start)
        return jnp.concatenate([y_BTH, back_BTH], axis=-1), last


class Recurrent(nnx.Module):
    """A stack of layers.

    The leaves of a layer stand under its name with a first axis of 1, as those of stacked layers do. `rate` is the dropout between layers.
    """

    def __init__(
        self, cell: str, width: int, hidden: int, layers: int, *, bidirectional: bool, rate: float, precision: str, remat: str,
        sites: Sites, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.cell, self.hidden, self.layers, self.rate, self.remat = cell, hidden, layers, rate, remat
        for i, name in enumerate(names(layers)):
            size = hidden * (1 + bidirectional) if i else width
            make = functools.partial(Layer, cell, bidirectional, size, hidden, range(i, i + 1), precision, sites)
            build = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: "layers"})
            setattr(self, name, nnx.split_rngs(splits=1)(build)(rngs))

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array, key: jax.Array | None, cache: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """Dropout acts where there is a key. What reads backward knows nothing of a cache."""
        remat = self.remat if cache is None else "none"
        nothing = empty(self.cell, segments_BT.shape[0], self.hidden, self.layers)
        cache = cache or nothing
        forward, segment = marks(segments_BT, cache.segment)
        ways = {"forward": forward, "backward": marks(segments_BT, nothing.segment, reverse=True)[0]}
        states = {}
        for i, name in enumerate(names(self.layers)):
            layer_key = None if key is None else jax.random.fold_in(key, i)
            if i:
                x_BTD = dropout(x_BTD, self.rate, keys.fold(layer_key, "dropout"))
            graph, weights = nnx.split(getattr(self, name))

            def run(weights, x_BTD, layer_key, start, graph=graph):
                layer: Any = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], weights))
                return layer(x_BTD, ways, layer_key, start)

            if remat != "none":
                run = jax.checkpoint(run, policy=REMAT[remat])
            x_BTD, states[name] = run(weights, x_BTD, layer_key, cache.states[name])
            x_BTD = mesh.constrain(x_BTD, "batch", None, None)
        return x_BTD, RecurrentCache(states, segment)
