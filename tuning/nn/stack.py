"""A stack of layers: a row of segments, each run as one scan over groups of layers.

Layers may differ in kind (local and global attention, dense and routed feed-forward), and kinds repeat: a group is one period of them,
and each of its layers is stacked with its likes in the other groups. A stacked leaf cannot learn in some of its layers only, so the stack
is cut where a method asks. One segment of like layers is the normal case. A leaf's name tells its layers: those of layers 12 to 15 stand
under `blocks/12-15/`, those of layers 0, 2, 4 and 6 under `blocks/0-6x2/`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import mesh
from tuning.nn.cache import Cache, write

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
LONGEST_PERIOD = 8
_PLACE = re.compile(r"(?P<before>(?:.*/)?)blocks/(?P<first>\d+)-(?P<last>\d+)(?:x(?P<step>\d+))?/(?P<after>.*)")

Segment = tuple[tuple[str, range], ...]  # the layers that are stacked together, by name; one for each place in the period


def apart(name: str) -> tuple[str, range | None]:
    """A leaf's name without its layers, and these: `decoder/blocks/0-6x2/attn/q` is `decoder/attn/q` of range(0, 7, 2)."""
    found = _PLACE.fullmatch(name)
    if found is None:
        return name, None
    layers = range(int(found["first"]), int(found["last"]) + 1, int(found["step"] or 1))
    return found["before"] + found["after"], layers


def layer_range(name: str) -> range | None:
    """The layers that a leaf holds, from its name; None for a leaf outside the stack."""
    return apart(name)[1]


def counted_layers(name: str) -> range | None:
    """The same as a method counts layers: of an encoder-decoder those of the decoder, which stand behind the whole encoder."""
    return None if name.startswith("encoder/") else layer_range(name)


def segments(kinds: Sequence[Hashable], cuts: tuple[int, ...]) -> list[Segment]:
    """The segments of a stack of layers of these kinds, cut before the layers that `cuts` gives."""
    layers = len(kinds)
    if bad := [cut for cut in cuts if not 0 <= cut <= layers]:
        raise ValueError(f"Cannot cut a stack of {layers} layers at {bad}; a cut lies between 0 and {layers}.")
    found: list[Segment] = []
    start = 0
    while start < layers:
        end = min([cut for cut in cuts if cut > start], default=layers)
        period, stop = max(((p, _reach(kinds, start, end, p)) for p in range(1, LONGEST_PERIOD + 1)), key=lambda x: (x[1], -x[0]))
        places = [range(start + i, stop - period + i + 1, period) for i in range(period)]
        found.append(tuple((_name(place), place) for place in places))
        start = stop
    return found


def _reach(kinds: Sequence[Hashable], start: int, end: int, period: int) -> int:
    """Where the kinds, from `start` on, stop repeating with this period; whole periods, and at least two of them unless it is 1."""
    stop = next((i for i in range(start + period, end) if kinds[i] != kinds[i - period]), end)
    whole = (min(stop, end) - start) // period
    return start + whole * period if whole >= 2 or period == 1 else start


def _name(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" + (f"x{layers.step}" if layers.step > 1 and len(layers) > 1 else "")


class Stack(nnx.Module):
    """`make(kind, layers, rngs)` builds one of the layers that are stacked; it is called with (x, context, kind, key, state)."""

    def __init__(
        self, make: Callable[[Any, range, nnx.Rngs], nnx.Module], kinds: Sequence[Any], cuts: tuple[int, ...], remat: str, rngs: nnx.Rngs
    ):
        self.remat, self.kinds, self.segments = remat, tuple(kinds), tuple(segments(kinds, cuts))
        for name, layers in (place for segment in self.segments for place in segment):
            build = nnx.vmap(functools.partial(make, kinds[layers[0]], layers), transform_metadata={nnx.PARTITION_NAME: "layers"})
            setattr(self, name, nnx.split_rngs(splits=len(layers))(build)(rngs))

    def __call__(self, x_BTD: jax.Array, context: Any, key: jax.Array | None, cache: Cache | None) -> tuple[jax.Array, Any, Cache | None]:
        """(x_BTD, sums over layers of what they measure, cache)."""
        stored, sums = {} if cache is None else dict(cache.layers), {}
        for segment in self.segments:
            x_BTD, new, measured = self._scan(segment, x_BTD, context, key, cache)
            stored |= new
            for name, value in measured.items():
                sums[name] = sums[name] + value if name in sums else value
        return x_BTD, sums, None if cache is None else cache.advance(stored, x_BTD.shape[1])

    def each(self, ask: Callable[[Any], Any]) -> dict[str, Any]:
        """{layers, by name: what `ask(layer)` answers for each, stacked}."""
        answers = {}
        for name, _ in (place for segment in self.segments for place in segment):
            graph, weights = nnx.split(getattr(self, name))
            answers[name] = jax.lax.map(lambda w, graph=graph: ask(nnx.merge(graph, w)), weights)
        return answers

    def _scan(self, segment: Segment, x_BTD: jax.Array, context: Any, key: jax.Array | None, cache: Cache | None):
        graphs, weights = zip(*(nnx.split(getattr(self, name)) for name, _ in segment), strict=True)
        fold = None if key is None else functools.partial(jax.random.fold_in, key)
        layer_keys = None if fold is None else tuple(jax.vmap(fold)(jnp.array(layers)) for _, layers in segment)
        memory = None if cache is None or cache.memory is None else tuple(cache.memory[name] for name, _ in segment)

        def body(carry, layer):
            x_BTD, stored = carry
            index, weights, layer_keys, memory = layer
            measured = {}
            for i, (name, layers) in enumerate(segment):

                def store(k, v, name=name):
                    assert cache is not None
                    stored[name] = tuple(write(whole, part, index, cache.length) for whole, part in zip(stored[name], (k, v), strict=True))
                    return stored[name][0][index], stored[name][1][index]

                kind = self.kinds[layers[0]]
                ask = store if name in stored else None
                run = functools.partial(_run, graphs[i], context, kind, ask, None if memory is None else memory[i])
                if self.remat != "none" and cache is None:
                    # Of several layers in a turn, none is made again before its gradient is there: compilers would make all at once.
                    run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=len(segment) > 1)
                x_BTD, new = run(weights[i], x_BTD, None if layer_keys is None else layer_keys[i])
                x_BTD = mesh.constrain(x_BTD, "batch", "sequence", None)
                measured |= {n: measured[n] + value if n in measured else value for n, value in new.items()}
            return (x_BTD, stored), measured

        stored = {} if cache is None else {name: cache.layers[name] for name, _ in segment}
        turns = jnp.arange(len(segment[0][1]))
        (x_BTD, stored), measured = jax.lax.scan(body, (x_BTD, stored), (turns, weights, layer_keys, memory))
        return x_BTD, stored, jax.tree.map(lambda values: values.sum(0), measured)


def _run(graph, context, kind, store, memory, weights, x_BTD, key):
    """One layer, from its weights."""
    return nnx.merge(graph, weights)(x_BTD, context, kind, key, store, memory)
