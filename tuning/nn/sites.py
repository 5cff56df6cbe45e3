"""Sites: the places in a network where a tuning method may add parameters.

A layer asks `sites` at each place and gets a module, or None. Because the answer is born inside the layer, the scan over layers stacks
it, the mesh rules shard it and the checkpoint names it; its leaves stand under `.../adapter/`.

Shapes: B sequences, T tokens, D (input) width, F output width, n prefix tokens, K key-value heads, H head width, "..." any leading axes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from tuning.nn.weight import Axes, Stored, multiply, value


@dataclasses.dataclass(frozen=True)
class Site:
    """One place, as a method sees it.

    role    of a projection `attn/q` or `mlp/down`, of a sublayer `attn` or `mlp`; `embed` and `head` outside the layers
    shape   (in, out) of a kernel, (vocabulary, width) of the embedding, (width, width) of a sublayer, (K, H) of what attention looks at
    axes    the logical axes of that shape
    layers  the layers whose stacked leaves it belongs to; none of them outside the layers
    scale   what looked-up rows of the embedding are multiplied by
    """

    role: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    layers: range = range(0)
    scale: float = 1.0

    def matches(self, target: str) -> bool:
        """Whether a target names this site."""
        return named(target, self.role)


def named(target: str, role: str) -> bool:
    """Whether a target names a role: whole, by its last part, or as a regular expression for the whole of it."""
    return target in (role, role.rsplit("/", 1)[-1]) or re.fullmatch(target, role) is not None


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector as an array of like's rank and dtype that varies along the last axis only."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


@dataclasses.dataclass(frozen=True)
class Project:
    """The projection that a site belongs to: `project(x)` is x W + b and `project.times(x)` x W; `kernel` is W for those who need it."""

    stored: Stored
    bias: jax.Array | None
    axes: Axes = ()

    @property
    def kernel(self) -> jax.Array:
        return value(self.stored)

    def times(self, x: jax.Array) -> jax.Array:
        return multiply(x, self.stored, self.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.times(x)
        return y if self.bias is None else y + along_last(self.bias, y)


@dataclasses.dataclass(frozen=True)
class Sites:
    """What a method answers at each kind of place: a module, or None to leave the place as it is.

    weight  a projection: answer(x [..., D], project, key) -> [..., F], in its place
    branch  a sublayer: answer(residual, y, norm, key) -> [B, T, D], what is added to the residual stream in y's place. residual went into
            the sublayer and y came out; norm follows the sum, or is None where the sum is not normalised
    memory  what attention looks at: answer() -> keys and values [n, K, H], seen by every token in front of its own sequence, as far
            as a window reaches; n is the offset
    embed   the embedding: answer(tokens, positions, lookup) -> [B, T, D]; positions are None in a decoder that an encoder stands before.
            answer.output(x [M, D], project, key) -> logits [M, V], in the place of an output that is tied to the embedding
    head    an output over the vocabulary with a kernel of its own: answer(x [M, D], project, key) -> logits [M, V], in its place
    offset  the position of the first token
    """

    weight: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None
    branch: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None
    memory: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None
    embed: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None
    head: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None
    offset: int = 0


NOTHING = Sites()


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a method may know of a network before it is built.

    layers    how many there are
    sites     the projections
    leaves    their names (uncut, nothing added)
    branches, memories, embeds, heads  the places of these kinds
    encode    text -> token ids; None without a tokenizer
    """

    layers: int
    sites: tuple[Site, ...]
    leaves: tuple[str, ...]
    branches: tuple[Site, ...] = ()
    memories: tuple[Site, ...] = ()
    embeds: tuple[Site, ...] = ()
    heads: tuple[Site, ...] = ()
    encode: Callable[[str], list[int]] | None = None

    def chosen(self, targets: Iterable[str]) -> frozenset[str]:
        """The roles that targets name. ValueError for a target that names none."""
        roles = ", ".join(dict.fromkeys(site.role for site in self.sites))
        for target in list(targets) or [""]:
            if not any(site.matches(target) for site in self.sites):
                raise ValueError(f"method.targets: {target!r} matches no site of this model. There are: {roles}.")
        return frozenset(site.role for site in self.sites if any(site.matches(target) for target in targets))
