"""How a kernel is multiplied, whether it is stored as an array or in codes.

Shapes: D inputs, F outputs, "..." any leading axes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from tuning.core import mesh
from tuning.nn import quantised
from tuning.nn.quantised import Quantised, dequantise

Stored = jax.Array | Quantised
Axes = tuple[str | None, ...]


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times a kernel [D, F], in x's dtype.

    Written as one product of two matrices: the gradient of a product with more axes sums over several of them, which XLA does on CPU
    without its fast matmul. Where a mesh splits sequences, their tokens cannot be put into one row: it would gather them.
    """
    if x.ndim == 3 and mesh.pieces(x.shape[1], "sequence") > 1:
        return x @ kernel.astype(x.dtype)
    return (x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


def value(stored: Stored) -> jax.Array:
    """The kernel as an array."""
    return dequantise(stored) if isinstance(stored, Quantised) else stored


def cast(stored: Stored, dtype: Any) -> Stored:
    """The kernel in the dtype of a computation; in codes it stays as it is."""
    return stored if isinstance(stored, Quantised) else stored.astype(dtype)


def parted(stored: Stored, axes: Axes, where: Mesh | jax.sharding.AbstractMesh) -> tuple[Stored, Any]:
    """The kernel for a shard_map that splits it over its logical axes, and how each of its arrays is split.

    In codes it stays if these are split as an array would be, with scales that are not quantised: those share their steps over outputs.
    """
    split = mesh.spec(stored.shape, axes, where)
    if isinstance(stored, Quantised):
        q = quantised.single(stored)
        specs = jax.tree.map(lambda leaf, names: mesh.spec(leaf.shape, names, where), q, quantised.axes(q, axes))
        *lead, inputs, _, outputs = specs.codes
        if (*lead, inputs, outputs) == tuple(split):
            return q, specs
    return value(stored), split


def multiply(x: jax.Array, stored: Stored, axes: Axes = ()) -> jax.Array:
    """x [..., D] times the kernel [D, F], in x's dtype; axes are the kernel's logical ones.

    In codes the kernel is a constant: the gradient is x's alone. Where devices share its parts of the residual stream's width, they
    gather codes; left to itself, XLA would gather values.
    """
    if not isinstance(stored, Quantised):
        return matmul(x, stored)
    return _product(tuple(None if axis == "embed" else axis for axis in axes), x, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(split: Axes, x: jax.Array, q: Quantised) -> jax.Array:
    return matmul(x, dequantise(_gathered(q, split), x.dtype))


def _backward(split: Axes, q: Quantised, dy: jax.Array) -> tuple[jax.Array, None]:
    # Without a barrier XLA sees that the forward pass computed the same kernel, and keeps that one.
    q, dy = jax.lax.optimization_barrier((q, dy))
    return matmul(dy, dequantise(_gathered(q, split), dy.dtype).T), None


_product.defvjp(lambda split, x, q: (_product(split, x, q), q), _backward)


def _gathered(q: Quantised, split: Axes) -> Quantised:
    return jax.tree.map(lambda leaf, names: mesh.constrain(leaf, *names), q, quantised.axes(q, split)) if split else q
