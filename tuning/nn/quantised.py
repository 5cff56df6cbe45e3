"""A kernel in few bits: a code for each value, and a scale for each block of values.

int8 and int4 are multiples of a step; nf4 is the 4-bit NormalFloat of QLoRA (Dettmers et al., 2023, arXiv:2305.14314), which puts its
16 levels where normally distributed weights are. A value is its code's level times its block's scale.

A block is some consecutive inputs of one output. bitsandbytes cuts torch's flattened [out, in] into the same blocks where their size
divides the inputs, and an nf4 kernel has the same values here to the last bit. The output axis may be split over devices anywhere; the
input axis is stored as an axis of whole blocks, in codes and scales alike, so that both are split at the same places or, where a mesh
axis does not divide the number of blocks, neither is.

Shapes: D inputs, F outputs, N = D / block blocks, R bytes of a block's codes, S = F / 256 blocks of scales, rounded up; "..." any axes
before, of layers or experts.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SCALES = 256  # scales that share a step, where the scales are quantised too


class Kind(NamedTuple):
    """The levels of the codes, in order, and the value that a block's largest is scaled to. More than 16 levels are whole numbers."""

    levels: tuple[float, ...]
    bound: float


NORMAL = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Of whole numbers half a step beyond the last level: the largest values are off by half a step, as any may be, and steps are smaller.
KINDS = {
    "int8": Kind(tuple(range(-127, 128)), 127.5),
    "int4": Kind(tuple(range(-7, 8)), 7.5),
    "nf4": Kind(NORMAL, 1.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales [..., N, F] as mean + codes * steps: QLoRA's double quantisation.

    Whole numbers for codes: of scales around their mean they are closer than the 8-bit floats of QLoRA, and need no table.

    codes  int8 [..., N, F]
    steps  float32 [..., N, S]
    mean   float32 [...], of a kernel's scales
    """

    codes: Any
    steps: Any
    mean: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """What stands for a kernel [..., D, F].

    codes   int8 [..., N, R, F]; of 4 bits uint8 with two codes in a byte: the high halves hold the first half of the block. (With
            neighbours in a byte, a TPU would take longer to interleave them than for all the rest.)
    scales  float32 [..., N, F], or Scales
    kind    one of KINDS
    dtype   of the kernel that it stands for
    """

    codes: Any
    scales: Any
    kind: str = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def block(self) -> int:
        return self.codes.shape[-2] * (2 if _packed(self.kind) else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        *lead, blocks, _, outputs = self.codes.shape
        return (*lead, blocks * self.block, outputs)

    @property
    def sharding(self) -> NamedSharding:
        """Of a kernel that is split as the codes are."""
        place, rank = self.codes.sharding, len(self.codes.shape)
        *lead, inputs, _, outputs = (*place.spec, *[None] * (rank - len(place.spec)))
        return NamedSharding(place.mesh, PartitionSpec(*lead, inputs, outputs))


def quantise(kernel: jax.Array, kind: str, block: int = 64, double: bool = False) -> Quantised:
    """The kernel [..., D, F] in codes; `double` quantises the scales too. ValueError where the block does not divide D."""
    check(kernel.shape, kind, block)
    if kernel.ndim > 2:
        return jax.vmap(lambda one: quantise(one, kind, block, double))(kernel)
    inputs, outputs = kernel.shape
    x_NBF = kernel.astype(jnp.float32).reshape(inputs // block, block, outputs)
    scales_NF = jnp.abs(x_NBF).max(1) / KINDS[kind].bound
    codes_NRF = _codes(kind, x_NBF, scales_NF[:, None])
    if _packed(kind):
        codes_NRF = codes_NRF[:, : block // 2] << 4 | codes_NRF[:, block // 2 :]
    return Quantised(codes_NRF, _double(scales_NF) if double else scales_NF, kind, np.dtype(kernel.dtype))


def dequantise(q: Quantised, dtype: Any = None) -> jax.Array:
    """The kernel [..., D, F] that the codes stand for, computed in float32; in q's dtype if none is given."""
    if q.codes.ndim > 3:
        return jax.vmap(lambda one: dequantise(one, dtype))(q)
    codes_NBF = q.codes
    if _packed(q.kind):
        codes_NBF = jnp.concatenate([q.codes >> 4, q.codes & 15], axis=1)
    return _values(q.kind, codes_NBF, single(q).scales).reshape(q.shape).astype(q.dtype if dtype is None else dtype)


def single(q: Quantised) -> Quantised:
    """The same with scales that are not quantised, float32 [..., N, F]."""
    if not isinstance(q.scales, Scales):
        return q
    codes, steps, mean = q.scales.codes, q.scales.steps, q.scales.mean
    spread = jnp.repeat(steps, SCALES, axis=-1)[..., : codes.shape[-1]]
    return dataclasses.replace(q, scales=jnp.maximum(mean[..., None, None] + codes.astype(jnp.float32) * spread, 0))


def axes(q: Quantised, names: tuple[str | None, ...]) -> Quantised:
    """The logical axes of each child, from those of the kernel: q with a tuple of names in each array's place."""
    *lead, inputs, outputs = names
    scales: Any = (*lead, inputs, outputs)
    if isinstance(q.scales, Scales):
        scales = Scales(scales, (*lead, inputs, None), tuple(lead))
    return dataclasses.replace(q, codes=(*lead, inputs, None, outputs), scales=scales)


def bytes_per_parameter(kind: str, block: int = 64, double: bool = False) -> float:
    """Bytes for one value of a large kernel, scales counted."""
    return (0.5 if _packed(kind) else 1.0) + (1 + 4 / SCALES if double else 4) / block


def check(shape: tuple[int, ...], kind: str, block: int) -> None:
    """ValueError unless a kernel of this shape can be quantised so."""
    if kind not in KINDS:
        raise ValueError(f"Kernels are not quantised as {kind!r}. There are: {', '.join(KINDS)}.")
    step = 2 if _packed(kind) else 1
    if block < 1 or block % step:
        rule = "a positive even number, for two codes share a byte" if step == 2 else "at least 1"
        raise ValueError(f"Blocks of {block} values cannot be: for {kind} the block is {rule}. Set it to 64.")
    if shape[-2] % block:
        fits = [size for size in range(step, block, step) if shape[-2] % size == 0]
        remedy = f"Use blocks of {fits[-1]}, or leave this kernel as it is" if fits else "Leave this kernel as it is"
        raise ValueError(f"A kernel with {shape[-2]} inputs has no whole number of blocks of {block}. {remedy}.")


def _packed(kind: str) -> bool:
    return len(KINDS[kind].levels) <= 16


def _codes(kind: str, x: jax.Array, scales: jax.Array) -> jax.Array:
    """The number of the level nearest to x / scales; of int8 the level itself."""
    # Multiplied by the inverse, as bitsandbytes does: what lies between two levels must fall to the same one. A block of zeros stays so.
    scaled = x * jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, 1 / scales)
    levels = np.asarray(KINDS[kind].levels, np.float32)
    if not _packed(kind):
        return jnp.round(scaled).clip(levels[0], levels[-1]).astype(jnp.int8)
    middles = (levels[1:] + levels[:-1]) / 2
    return functools.reduce(operator.add, ((scaled > middle).astype(jnp.uint8) for middle in middles))


def _values(kind: str, codes_NBF: jax.Array, scales_NF: jax.Array) -> jax.Array:
    """The levels of the codes times the scales, [N, B, F]."""
    if not _packed(kind):
        return codes_NBF.astype(jnp.float32) * scales_NF[:, None]
    # Chosen bit by bit from the block's 16 values, because a TPU is slow at looking each code up in a table. The scales come first: to
    # choose between constants, jax would make 16 arrays of the kernel's size before a loop over layers, and keep them.
    levels = [*KINDS[kind].levels, *[0.0] * (16 - len(KINDS[kind].levels))]
    values = [(scales_NF * np.float32(level))[:, None] for level in levels]
    for bit in range(4):
        odd = (codes_NBF >> bit & 1).astype(bool)
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _double(scales_NF: jax.Array) -> Scales:
    # The mean is taken of whole numbers: a sum of floats would depend on how it is shared out, and a scale on the mesh it was made on.
    sixteenth = scales_NF.max() / 16
    mean = _codes("int8", scales_NF, sixteenth).sum(dtype=jnp.int32) * (sixteenth / scales_NF.size)
    rest_NF = scales_NF - mean
    blocks_NSX = jnp.pad(rest_NF, ((0, 0), (0, -rest_NF.shape[1] % SCALES))).reshape(rest_NF.shape[0], -1, SCALES)
    steps_NS = jnp.abs(blocks_NSX).max(2) / KINDS["int8"].bound
    spread_NF = jnp.repeat(steps_NS, SCALES, axis=1)[:, : rest_NF.shape[1]]
    return Scales(_codes("int8", rest_NF, spread_NF), steps_NS, mean)
