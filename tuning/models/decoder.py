"""The decoder of the Llama family: Llama 2 and 3, Mistral, Qwen 2 and 3 are configurations of it.

RMSNorm before each sublayer, rotary positions, grouped queries, a gated feed-forward layer (Touvron et al., 2023, arXiv:2307.09288).
Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.core.types import Batch
from tuning.nn import cache as caches
from tuning.nn.attention import Attention, Context, Shape
from tuning.nn.linear import Embedding, HeadWeights, make_head
from tuning.nn.mlp import ACTIVATIONS, GatedMLP
from tuning.nn.norm import RMSNorm
from tuning.nn.rotary import frequencies
from tuning.nn.sites import Sites
from tuning.nn.stack import REMAT, Stack, segments


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture, and how it computes.

    hidden         width of the feed-forward layer
    rope_scaling   the checkpoint's rope_scaling (`rope_type` and its numbers), or None
    window         tokens that a token sees, itself included; None for all before it
    added          (first id, count) of added tokens, whose rows are leaves of their own
    dtype          of the computation, "float32" or "bfloat16"
    precision      of float32 matmuls on GPU and TPU, "highest" (exact) or "default" (fast)
    remat          what the backward pass keeps: "none" (all), "dots" (matmul results), "full" (only each layer's input)
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    window: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    added: tuple[int, int] = (0, 0)
    dtype: str = "float32"
    precision: str = "highest"
    remat: str = "none"

    def __post_init__(self):
        positive = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "max_length")
        if low := [f"{name}={getattr(self, name)}" for name in positive if getattr(self, name) < 1]:
            raise ValueError(f"A decoder's sizes are positive; {', '.join(low)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}, which share them.")
        for name, known in (("dtype", ("float32", "bfloat16")), ("precision", ("highest", "default")), ("remat", tuple(REMAT))):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.added[1] and self.added[0] > self.vocab_size:
            raise ValueError(f"added={self.added} leaves a gap behind the {self.vocab_size} rows of the table.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}.")

    @property
    def vocabulary(self) -> int:
        """Logits per position: the table's rows, or more where added tokens lie beyond them."""
        return max(self.vocab_size, sum(self.added))

    def attention_flops(self, length: float) -> float:
        """Forward FLOPs per token of causal attention over sequences of `length` tokens, projections not counted."""
        seen = length if self.window is None else min(length, 2 * self.window)
        return 2 * self.layers * seen * self.heads * self.head_dim

    def empty_cache(self, batch: int, slots: int, cuts: tuple[int, ...] = ()) -> caches.Cache:
        """A cache for `slots` tokens of each sequence, in the dtype of the computation."""
        counts = {name: stop - start for name, (start, stop) in segments(self.layers, cuts).items()}
        return caches.empty(counts, batch, slots, self.kv_heads, self.head_dim, jnp.dtype(self.dtype))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layers: tuple[int, int], sites: Sites, rngs: nnx.Rngs):
        c = config
        shape = Shape(
            width=c.width, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, window=c.window, bias=c.attention_bias,
            out_bias=c.attention_out_bias, qk_norm=c.qk_norm, eps=c.norm_eps, precision=c.precision,
        )  # fmt: skip
        self.attn_norm = RMSNorm(c.width, c.norm_eps)
        self.attn = Attention(shape, layers, sites, rngs)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.mlp = GatedMLP(c.width, c.hidden, c.activation, c.mlp_bias, layers, sites, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context, key: jax.Array | None, store) -> jax.Array:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), context, key, store)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), key)


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, sites: Sites, cuts: tuple[int, ...], rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width, rngs, added=c.added)
        self.blocks = Stack(lambda layers, r: Block(c, layers, sites, r), c.layers, cuts, c.remat, rngs)
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.head = None if c.tied else HeadWeights(c.width, c.vocab_size, rngs, added=c.added)

    def __call__(self, batch: Batch, cache: caches.Cache | None, key: jax.Array | None):
        """(hidden_BTD, head, {}, cache); attention stays inside a segment, and segment 0 is padding."""
        c, positions_BT, segments_BT = self.config, batch.positions, batch.segments
        with jax.default_matmul_precision(c.precision):
            if cache is not None:
                cache = cache.extend(segments_BT, positions_BT)
            seen = (positions_BT, segments_BT) if cache is None else (cache.positions, cache.segments)
            context = Context(positions_BT, segments_BT, frequencies(c.head_dim, c.rope_theta, c.rope_scaling), *seen)
            context.prepare(c.window)
            x_BTD = mesh.constrain(self.embed(batch.tokens, jnp.dtype(c.dtype)), "batch", None, None)
            x_BTD, cache = self.blocks(x_BTD, context, keys.fold(key, "blocks"), cache)
            return self.norm(x_BTD), make_head(self.embed, self.head, c.precision), {}, cache


def construct(config: DecoderConfig, sites: Sites, cuts: tuple[int, ...] = ()) -> Callable[[nnx.Rngs], nnx.Module]:
    """What `models.network.build` wants: a constructor that only needs random streams."""
    return lambda rngs: Decoder(config, sites, cuts, rngs)
