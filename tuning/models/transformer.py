"""The transformer that decoders and encoders are: GPT-2, Llama, Gemma, Mixtral, BERT and the others are configurations of it.

Shapes: B sequences, T tokens, S keys, D width, n keys of a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.core.types import Batch, Mean
from tuning.models.checks import check
from tuning.models.heads import LANGUAGE_MODEL, Head, HeadConfig
from tuning.nn import cache as caches
from tuning.nn import kernels, moe, rotary
from tuning.nn.attention import FUSED, QK_NORMS, Seen, Shape
from tuning.nn.block import ORDERS, Block, Context, Kind, Layer
from tuning.nn.blockwise import EVERYWHERE, Marks
from tuning.nn.dropout import dropout
from tuning.nn.linear import Embedding, Table
from tuning.nn.mlp import ACTIVATIONS
from tuning.nn.norm import NORMS, Norm
from tuning.nn.position import RelativeBias, alibi, alibi_of_keys
from tuning.nn.sites import NOTHING, Sites
from tuning.nn.stack import Stack, segments

POSITIONS = ("rotary", "learned", "alibi", "alibi_keys", "relative")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A transformer's architecture, and how it computes. The defaults are Llama's.

    hidden         width of the feed-forward layer
    kinds          what tells the layers from one another, one Kind for each; () if all are like Kind()
    causal         whether a token sees only itself and those before it
    order          where sublayers are normalised, one of tuning.nn.block.ORDERS
    norm           one of tuning.nn.norm.NORMS
    final_norm     whether the output of the last layer is normalised
    positions      "rotary", "learned" (a table), "alibi" or "relative" (a bias on the scores), "alibi_keys" (the same as Falcon rounds
                   it, and scaled like the products)
    position_offset  the table's row of position 0
    rope_scaling   `rope_type` and its numbers, or None; for layers whose rope is "global". Those that are "local" use local_theta alone
    rotary_dim     how much of each head is rotated; 0 for all
    relative       (buckets, longest distance) of the relative bias
    type_count     rows of the token types' table; 0 for none
    fused          how q, k and v share a kernel, one of tuning.nn.attention.FUSED; fused_mlp, whether gate and up share one
    scale          of the products of queries and keys; 0 for 1 / sqrt(head_dim)
    embed_scale    of the embedding; embed_norm, whether it is normalised
    expert_hidden, experts, per_token, normalize_experts  of the routed layers' mixture of experts
    dropout        of what `dropped` names: the embedding, and what the "attn" and the "mlp" sublayers add; attention_dropout, of the
                   attention shares; mlp_dropout, inside the feed-forward layer; all while training
    head           what stands on top; tied, whether its output is the embedding
    added          (first id, count) of added tokens, whose rows are leaves of their own
    dtype          of the computation, "float32" or "bfloat16"
    precision      of float32 matmuls on GPU and TPU, "highest" (exact) or "default" (fast)
    remat          what the backward pass keeps: "none" (all), "dots" (matmul results), "full" (only each layer's input)
    attention      how sequences attend to themselves, one of tuning.nn.kernels.MULTIPLES; see `attention_on`
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    max_length: int
    kinds: tuple[Kind, ...] = ()
    causal: bool = True
    order: str = "before"
    norm: str = "rms"
    norm_eps: float = 1e-6
    final_norm: bool = True
    positions: str = "rotary"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    rotary_dim: int = 0
    local_theta: float = 10_000.0
    relative: tuple[int, int] = (32, 128)
    type_count: int = 0
    fused: str = ""
    qk_norm: str = ""
    attention_bias: bool = False
    attention_out_bias: bool = False
    scale: float = 0.0
    softcap: float = 0.0
    activation: str = "silu"
    gated: bool = True
    fused_mlp: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False
    experts: int = 0
    per_token: int = 0
    expert_hidden: int = 0
    normalize_experts: bool = True
    dropout: float = 0.0
    dropped: tuple[str, ...] = ("embed", "attn", "mlp")
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    head: HeadConfig = LANGUAGE_MODEL
    tied: bool = False
    added: tuple[int, int] = (0, 0)
    dtype: str = "float32"
    precision: str = "highest"
    remat: str = "none"
    attention: str = "blockwise"

    def __post_init__(self):
        if not self.kinds:
            object.__setattr__(self, "kinds", (Kind(),) * self.layers)
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "max_length")
        choices = dict(order=ORDERS, norm=NORMS, positions=POSITIONS, fused=FUSED, qk_norm=QK_NORMS, activation=tuple(ACTIVATIONS))
        choices |= dict(attention=tuple(kernels.MULTIPLES))
        check(self, sizes, choices)
        if len(self.kinds) != self.layers:
            raise ValueError(f"kinds describes {len(self.kinds)} layers, and there are layers={self.layers}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}, which share them.")

    start = None  # no token stands before what it reads

    @property
    def vocabulary(self) -> int:
        """Ids that a token may have: the table's rows, or more where added tokens lie beyond them."""
        return max(self.vocab_size, sum(self.added))

    @property
    def reads(self) -> str:
        """How text is laid out for it: "decoder" or "encoder"."""
        return "decoder" if self.causal else "encoder"

    def attention_flops(self, length: float) -> float:
        """Forward FLOPs per token of attention over sequences of `length` tokens, projections not counted."""
        half = 1 if self.causal else 2  # a causal query sees half of the keys
        seen = [half * length if kind.window is None else min(half * length, 2 * kind.window) for kind in self.kinds]
        return 2 * sum(seen) * self.heads * self.head_dim

    def attention_on(self, platform: str, form: str = "auto", prefix: int = 0, length: int | None = None) -> tuple[str, str]:
        """(the form of attention on devices of a platform, why it is not the one that was asked for); see kernels.choose."""
        bias = self.positions not in ("rotary", "learned")
        needs = kernels.Needs(self.dtype, self.head_dim, self.softcap, self.attention_dropout, bias, prefix, length)
        return kernels.choose(form, platform, needs)

    def layer(self, **more: Any) -> Layer:
        """What all layers share."""
        c = self
        attention = Shape(
            width=c.width, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, bias=c.attention_bias, out_bias=c.attention_out_bias,
            fused=c.fused, qk_norm=c.qk_norm, norm=c.norm, eps=c.norm_eps, scale=c.scale or c.head_dim**-0.5, softcap=c.softcap,
            dropout=c.attention_dropout, precision=c.precision, form=c.attention,
        )  # fmt: skip
        return Layer(
            attention, c.order, c.norm, c.norm_eps, c.hidden, c.activation, c.gated, c.fused_mlp, c.mlp_bias, c.dropout, c.mlp_dropout,
            dropped=c.dropped, experts=c.experts, per_token=c.per_token, expert_hidden=c.expert_hidden,
            normalize_experts=c.normalize_experts, **more,
        )  # fmt: skip

    def replace(self, **changes: Any) -> TransformerConfig:
        """With some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_dropout(self, rate: float) -> TransformerConfig:
        """With one rate wherever something is dropped."""
        return self.replace(dropout=rate, attention_dropout=rate, mlp_dropout=rate, head=self.head.with_dropout(rate))

    def empty_cache(self, batch: int, slots: int, cuts: tuple[int, ...] = ()) -> caches.Cache:
        """A cache for `slots` tokens of each sequence, in the dtype of the computation."""
        spans = {name: layers for segment in segments(self.kinds, cuts) for name, layers in segment}
        return caches.empty(spans, batch, slots, self.kv_heads, self.head_dim, jnp.dtype(self.dtype))

    def construct(self, sites: Sites, cuts: tuple[int, ...] = ()) -> Callable[[nnx.Rngs], nnx.Module]:
        """What `models.network.build` wants: a constructor that only needs random streams."""
        return lambda rngs: Transformer(self, sites, cuts, rngs)


class Transformer(nnx.Module):
    """An embedding, the layers and a head, as a TransformerConfig has them."""

    def __init__(self, config: TransformerConfig, sites: Sites, cuts: tuple[int, ...], rngs: nnx.Rngs):
        c = self.config = config
        self.embed, self.offset = Embedding(c.vocab_size, c.width, sites, rngs, added=c.added, scale=c.embed_scale), sites.offset
        learned = c.positions == "learned"
        self.positions = Table(c.max_length + c.position_offset, c.width, rngs) if learned else None
        self.types = Table(c.type_count, c.width, rngs) if c.type_count else None
        self.embed_norm = Norm(c.norm, c.width, c.norm_eps) if c.embed_norm else None
        self.relative, self.blocks, self.norm = trunk(c, c.layer(), sites, cuts, rngs)
        self.head = Head(c.head, c.width, c.vocab_size, c.tied, c.added, sites, rngs)

    def __call__(self, batch: Batch, cache: caches.Cache | None, key: jax.Array | None):
        """(hidden_BTD, head, measures, cache); attention stays inside a segment, and segment 0 is padding."""
        c = self.config
        batch = dataclasses.replace(batch, positions=batch.positions + self.offset)
        with jax.default_matmul_precision(c.precision):
            x_BTD = self._embed(batch, key)
            x_BTD, measures, cache = run(c, self, x_BTD, batch.positions, batch.segments, cache, key, self.offset)
            if c.head.pool == "mean":
                x_BTD = mean_of_segments(x_BTD, batch.segments)
            return x_BTD, self.head.bound(self.embed, c.precision, key, key), measures, cache

    def _embed(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x_BTD = self.embed(batch.tokens, batch.positions, dtype)
        if self.types is not None:
            x_BTD = x_BTD + self.types(jnp.zeros_like(batch.tokens) if batch.types is None else batch.types, dtype)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(batch.positions + c.position_offset, dtype)
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        x_BTD = dropout(x_BTD, c.dropout if "embed" in c.dropped else 0.0, keys.fold(key, "embed"))
        return mesh.constrain(x_BTD, "batch", "sequence", None)


def trunk(c: TransformerConfig, layer: Layer, sites: Sites, cuts: tuple[int, ...], rngs: nnx.Rngs):
    """(relative bias or None, the stack of layers, final norm or None)."""
    if c.positions not in ("rotary", "learned"):  # a bias by distance says nothing about what is no token
        sites = dataclasses.replace(sites, memory=NOTHING.memory)
    relative = RelativeBias(*c.relative, c.heads, c.causal, rngs) if c.positions == "relative" else None
    make = lambda kind, layers, rngs: Block(layer, kind, layers, sites, rngs)  # noqa: E731
    return relative, Stack(make, c.kinds, cuts, c.remat, rngs), Norm(c.norm, c.width, c.norm_eps) if c.final_norm else None


def run(
    c: TransformerConfig, net: Any, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, cache: caches.Cache | None,
    key: jax.Array | None, prefix: int = 0, **memory: Any,
) -> tuple[jax.Array, dict[str, Mean], caches.Cache | None]:  # fmt: skip
    """Through the trunk of `net`; `prefix` keys stand before the tokens, and `memory` is what a Context knows of an encoder."""
    past = cache
    if cache is not None:
        cache = cache.extend(segments_BT, positions_BT)
    seen = look(c, net.relative, positions_BT, segments_BT, past, cache, prefix)
    context = Context(seen, segments_BT != 0, **memory)
    x_BTD, sums, cache = net.blocks(x_BTD, context, keys.fold(key, "blocks"), cache)
    x_BTD = x_BTD if net.norm is None else net.norm(x_BTD)
    return x_BTD, {"balance": moe.balance(sums)} if sums else {}, cache


def look(
    c: TransformerConfig, relative: RelativeBias | None, positions_BT, segments_BT, past: Any, cache: Any, prefix: int
) -> dict[Kind, Seen]:  # fmt: skip
    """Who sees whom in each kind of layer. Computed once, so that a scan closes over it rather than computing it in every layer.

    The keys of a prefix have the positions before the first token's: every segment sees them, as far as a layer's window reaches.
    """
    queries = Marks(segments_BT, positions_BT)
    known = queries if cache is None else Marks(cache.segments, cache.positions)
    bias = None
    if c.positions == "alibi_keys":
        bias = mesh.constrain(alibi_of_keys(c.heads, known.positions) * c.layer().attention.scale, "batch", "heads", None, None)
    if c.positions in ("relative", "alibi"):
        # Between two tokens of one segment the places in the row are as far apart as the positions, and the same for all rows.
        first = 0 if past is None else past.length
        away_TS = first + jnp.arange(positions_BT.shape[1])[:, None] - jnp.arange(known.positions.shape[1])[None, :]
        bias = alibi(c.heads, away_TS) if relative is None else relative(away_TS)
        bias = mesh.constrain(bias, "heads", "sequence", None)
    # While a text grows, its length is what the cache can hold: angles that changed on the way would not fit the keys stored before.
    lengths_BT = _lengths(queries) if cache is None else jnp.full_like(positions_BT, known.positions.shape[1])
    turns = {rope: _angles(c, rope, positions_BT, lengths_BT) for rope in dict.fromkeys(kind.rope for kind in c.kinds)}
    if prefix:
        first_Bn = jnp.broadcast_to(jnp.arange(prefix), (positions_BT.shape[0], prefix))
        before = Marks(jnp.full_like(first_Bn, EVERYWHERE), first_Bn)
        known = Marks(*(jnp.concatenate(pair, axis=1) for pair in zip(before, known, strict=True)))
    own = known is queries
    return {kind: Seen(queries, known, c.causal, kind.window, own, bias, turns[kind.rope]) for kind in dict.fromkeys(c.kinds)}


def _lengths(marks: Marks) -> jax.Array:
    """[B, T]: how many positions the segment of each token has."""
    same_BTS = marks.segments[:, :, None] == marks.segments[:, None, :]
    return jnp.where(same_BTS, marks.positions[:, None, :], 0).max(-1) + 1


def _angles(c: TransformerConfig, rope: str, positions_BT, lengths_BT) -> tuple[jax.Array, jax.Array] | None:
    if c.positions != "rotary" or not rope:
        return None
    theta, scaling = (c.rope_theta, c.rope_scaling) if rope == "global" else (c.local_theta, None)
    return rotary.angles(positions_BT, *rotary.frequencies(c.rotary_dim or c.head_dim, theta, scaling, lengths_BT))


def mean_of_segments(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """At every token the mean over the tokens of its segment."""
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]).astype(x_BTD.dtype)
    return jnp.einsum("bts,bsd->btd", same_BTS, x_BTD) / same_BTS.sum(-1, keepdims=True)
