"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) in the half-rotation layout of published checkpoints.

Shapes: B sequences, T tokens, N heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> np.ndarray:
    """Radians per position, [H / 2]. `scaling` is the checkpoint's rope_scaling; ValueError for a kind that is not known."""
    freqs = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "default":
        return freqs.astype(np.float32)
    assert scaling is not None
    if kind == "linear":
        return (freqs / scaling["factor"]).astype(np.float32)
    if kind == "llama3":
        return llama3(freqs, scaling).astype(np.float32)
    raise ValueError(f"rope_type={kind!r} is not supported; known are default, linear and llama3.")


def llama3(freqs: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones stay, those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)  # within the original context
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * freqs / scaling["factor"] + blend * freqs


def angles(positions_BT: jax.Array, freqs: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, H / 2] in float32."""
    phase = positions_BT[..., None, None].astype(jnp.float32) * freqs.reshape(1, 1, 1, -1)
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + H / 2)."""
    one, two = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x_BTNH.dtype)
