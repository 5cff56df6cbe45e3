"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) in the half-rotation layout of published checkpoints.

Shapes: B sequences, T tokens, N heads, H head width, R the first part of it, which is rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ADAPTIVE = ("dynamic", "longrope")  # their frequencies depend on how long a sequence is


def frequencies(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, length_BT: Any = None) -> tuple[Any, float]:
    """(radians per position, factor on cos and sin). `scaling` is the checkpoint's rope_scaling, completed by its family.

    The radians are [R / 2], or [B, T, 1, R / 2] for the ADAPTIVE kinds, which need the length of each token's sequence so far.
    ValueError for a kind that is not known.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    freqs = theta**-exponents
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "default":
        return freqs.astype(np.float32), 1.0
    assert scaling is not None
    if kind == "linear":
        return (freqs / scaling["factor"]).astype(np.float32), 1.0
    if kind == "llama3":
        return _llama3(freqs, scaling).astype(np.float32), 1.0
    if kind == "yarn":
        return _yarn(freqs, theta, scaling).astype(np.float32), scaling["attention_factor"]
    if kind == "dynamic":
        longest = scaling["max_position_embeddings"]
        stretch_BT = scaling["factor"] * jnp.maximum(length_BT, longest) / longest - (scaling["factor"] - 1)
        base_BT = theta * stretch_BT ** (rotary_dim / (rotary_dim - 2))
        return base_BT[..., None, None] ** -exponents.astype(np.float32).reshape(1, 1, 1, -1), 1.0
    if kind == "longrope":
        short, long = (freqs / np.array(scaling[key], np.float64) for key in ("short_factor", "long_factor"))
        far_BT = length_BT > scaling["original_max_position_embeddings"]
        long, short = (x.astype(np.float32).reshape(1, 1, 1, -1) for x in (long, short))
        return jnp.where(far_BT[..., None, None], long, short), scaling["attention_factor"]
    raise ValueError(f"rope_type={kind!r} is not supported; known are default, linear, dynamic, llama3, yarn and longrope.")


def _llama3(freqs: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones stay, those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * freqs / scaling["factor"] + blend * freqs


def _yarn(freqs: np.ndarray, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): blended between the pairs that turn beta_fast and beta_slow times in the original
    context."""
    count = len(freqs)

    def pair(turns: float) -> float:
        return count * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    slowed = np.clip((np.arange(count) - first) / (last - first or 0.001), 0, 1)
    return freqs * (1 - slowed) + freqs / scaling["factor"] * slowed


def angles(positions_BT: jax.Array, freqs: Any, factor: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) times factor, each [B, T, 1, R / 2] in float32."""
    phase = positions_BT[..., None, None].astype(jnp.float32) * (freqs.reshape(1, 1, 1, -1) if freqs.ndim == 1 else freqs)
    return jnp.cos(phase) * factor, jnp.sin(phase) * factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + R / 2) of the first R; the rest passes."""
    half = cos.shape[-1]
    one, two = (x_BTNH[..., i * half : (i + 1) * half].astype(jnp.float32) for i in range(2))
    turned = [(one * cos - two * sin).astype(x_BTNH.dtype), (two * cos + one * sin).astype(x_BTNH.dtype)]
    return jnp.concatenate([*turned, x_BTNH[..., 2 * half :]], axis=-1)
