"""Sites: the places in a network where a tuning method may add parameters.

A layer asks `sites` at each place and gets a module, or None. Because the answer is born inside the layer, the scan over layers stacks
it, the mesh rules shard it and the checkpoint names it; its leaves stand under `.../adapter/`.

Shapes: D input width, F output width, "..." any leading axes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Site:
    """One projection, as a method sees it.

    role    its place in a layer, `attn/q` or `mlp/down`; `head` outside the layers
    shape   (in, out) of its kernel
    axes    the logical axes of its kernel
    layers  the layers whose stacked leaves it belongs to; none of them outside the layers
    """

    role: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    layers: range = range(0)

    def matches(self, target: str) -> bool:
        """Whether a target names this site: by its role, by the role's last part, or as a regular expression for the whole role."""
        return target in (self.role, self.role.rsplit("/", 1)[-1]) or re.fullmatch(target, self.role) is not None


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector as an array of like's rank and dtype that varies along the last axis only."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times a kernel [D, F], in x's dtype.

    Written as one product of two matrices: the gradient of a product with more axes sums over several of them, which XLA does on CPU
    without its fast matmul.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class Project:
    """The projection that a site belongs to: `project(x)` is x W + b; `project.kernel` is W for those who need it."""

    kernel: jax.Array
    bias: jax.Array | None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel)
        return y if self.bias is None else y + along_last(self.bias, y)


# answer(x [..., D], project, key) -> [..., F], in the projection's place
Answer = Callable[[jax.Array, Project, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Sites:
    """What a method answers at each kind of place."""

    weight: Callable[[Site, nnx.Rngs], Any] = lambda site, rngs: None


NOTHING = Sites()


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a method may know of a network before it is built: how many layers, which sites, which leaves (uncut, nothing added)."""

    layers: int
    sites: tuple[Site, ...]
    leaves: tuple[str, ...]
