"""VeRA: one pair of random projections for all sites, and two vectors that learn at each (Kopiczko et al., 2023, arXiv:2310.11454).

The projections are no leaves: they follow from a seed, as PEFT's do, and are constants of the program, so that no checkpoint holds them.
Shapes: L layers of a segment, D input width, F output width, R rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tuning.methods import kernels
from tuning.methods.kernels import Leaves
from tuning.methods.method import Method, added
from tuning.nn.dropout import dropout as drop
from tuning.nn.sites import Outline, Project, Site, along_last
from tuning.nn.weight import matmul


class Shared(NamedTuple):
    """What the projections follow from: the largest widths of the chosen sites, the rank and the seed of torch's generator."""

    width_in: int
    width_out: int
    rank: int
    seed: int

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """A [D, R] and B [R, F] of the largest widths, Kaiming uniform; a site takes A's first rows and B's first columns."""
        bits: Any = np.random.RandomState(self.seed)._bit_generator  # the Mersenne twister, seeded as torch seeds it

        def uniform(outputs: int, inputs: int) -> np.ndarray:
            """torch's Tensor.uniform_: 24 bits of each number, and one rounding at the end."""
            bound = float(np.float32(math.sqrt(3) * math.sqrt(2) / math.sqrt(inputs)))
            share = (bits.random_raw(outputs * inputs) & (2**24 - 1)) * 2.0**-24
            return (share * (2 * bound) - bound).astype(np.float32).reshape(outputs, inputs).T

        return uniform(self.rank, self.width_in), uniform(self.width_out, self.rank)


drawn = functools.cache(Shared.draw)  # so that a program has each of them once


class Vectors(nnx.Module):
    """x W + b + (((dropout(x) A) * d) B) * b', d being the leaf lambda_d [R] and b' the leaf lambda_b [F], which starts at zero."""

    def __init__(self, site: Site, shared: Shared, d_initial: float, dropout: float):
        self.lambda_d = nnx.Param(jnp.full(shared.rank, d_initial), out_sharding=("rank",))
        self.lambda_b = nnx.Param(jnp.zeros(site.shape[1]), out_sharding=site.axes[1:])
        self.shared, self.shape, self.dropout = shared, site.shape, dropout

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        a_DR, b_RF = map(jnp.asarray, drawn(self.shared))
        z = matmul(drop(x, self.dropout, key), a_DR[: self.shape[0]])
        y = matmul(z * along_last(self.lambda_d[...], z), b_RF[:, : self.shape[1]])
        return project(x) + y * along_last(self.lambda_b[...], y)


def vera(
    outline: Outline,
    *,
    rank: int = 256,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all",),
    projection_seed: int = 0,
) -> Method:
    """Random projections to `rank` and back, scaled by vectors that learn, at the sites that `targets` name (as LoRA's do).

    rank, d_initial  by default what the paper has for RoBERTa-large
    d_initial        where the vector in the middle starts; the one at the end starts at zero
    projection_seed  of the projections, PEFT's projection_prng_key; it must stay the same as long as the vectors are used
    """
    kernels.check(rank=rank, dropout=dropout)
    sites = kernels.chosen(outline, targets)
    shared = Shared(max(site.shape[0] for site in sites), max(site.shape[1] for site in sites), rank, projection_seed)

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        a_DR, b_RF = shared.draw()
        _, D, F = kernel_LDF.shape
        return kernel_LDF + (a_DR[None, :D] * own["lambda_d"][:, None]) @ (b_RF[None, :, :F] * own["lambda_b"][:, None])

    places = kernels.answered(sites, lambda site, rngs: Vectors(site, shared, d_initial, dropout))
    return Method(tuned=added, sites=places, fold=functools.partial(kernels.fold, adapted=adapted), loose=("d_initial",))
