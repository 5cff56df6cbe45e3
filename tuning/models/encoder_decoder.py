"""The encoder-decoder: T5 and its kin (Raffel et al., 2020, arXiv:1910.10683).

Shapes: B sequences, T tokens of the decoder, S tokens of the encoder, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.core.types import Batch, Inputs
from tuning.models import transformer
from tuning.models.heads import Head
from tuning.models.transformer import TransformerConfig, trunk
from tuning.nn import cache as caches
from tuning.nn.attention import Seen
from tuning.nn.blockwise import Marks
from tuning.nn.dropout import dropout
from tuning.nn.linear import Embedding
from tuning.nn.sites import Sites

# What encoder and decoder have in common.
SHARED = ("vocab_size", "width", "max_length", "dtype", "precision", "remat")
# Options of a transformer whose other values mean nothing here.
PLAIN = {
    "positions": "relative", "order": "before", "fused": "", "qk_norm": "", "embed_scale": 1.0, "embed_norm": False, "type_count": 0,
    "experts": 0, "dropped": TransformerConfig.dropped, "attention": "blockwise",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Two transformers that share an embedding; the decoder also attends to the encoder's output.

    encoder  its layers; what it says of the head does not count
    decoder  its layers, the embedding, the head, and how all of it computes
    start    the token that the decoder reads first; None where the checkpoint does not say
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    start: int | None

    def __post_init__(self):
        for name in SHARED:
            if getattr(self.encoder, name) != getattr(self.decoder, name):
                raise ValueError(f"Encoder and decoder differ in {name}, which they share. Set both to the same.")
        if self.encoder.causal or not self.decoder.causal:
            raise ValueError("An encoder sees both ways and a decoder does not. Set encoder.causal=False and decoder.causal=True.")
        for side in (self.encoder, self.decoder):
            for name, only in PLAIN.items():
                if getattr(side, name) != only:
                    raise ValueError(f"{name}={getattr(side, name)!r}: an encoder-decoder is only made for {only!r}.")
        if self.head.pool == "mean":
            raise ValueError("head.pool='mean': a decoder's tokens have no mean that stands for all of them. Set 'last'.")

    # What others ask of any config, the decoder answers.
    vocab_size = property(lambda self: self.decoder.vocab_size)
    width = property(lambda self: self.decoder.width)
    layers = property(lambda self: self.decoder.layers)
    max_length = property(lambda self: self.decoder.max_length)
    head = property(lambda self: self.decoder.head)
    tied = property(lambda self: self.decoder.tied)
    added = property(lambda self: self.decoder.added)
    dtype = property(lambda self: self.decoder.dtype)
    precision = property(lambda self: self.decoder.precision)
    remat = property(lambda self: self.decoder.remat)
    vocabulary = property(lambda self: self.decoder.vocabulary)
    attention_on = property(lambda self: self.decoder.attention_on)
    reads = "encoder_decoder"

    def attention_flops(self, length: float, inputs: float | None = None) -> float:
        """Forward FLOPs per decoder token of all attention. The decoder reads `length` tokens, and the encoder `inputs`, or as many."""
        read = length if inputs is None else inputs
        cross = 4 * self.layers * read * self.decoder.heads * self.decoder.head_dim
        return self.encoder.attention_flops(read) * read / length + self.decoder.attention_flops(length) + cross

    def replace(self, **changes: Any) -> EncoderDecoderConfig:
        """With fields of the decoder changed; what the encoder shares with it, and dropout, in both."""
        shared = {name: value for name, value in changes.items() if name in (*SHARED, "dropout", "attention_dropout", "mlp_dropout")}
        encoder, decoder = dataclasses.replace(self.encoder, **shared), dataclasses.replace(self.decoder, **changes)
        return dataclasses.replace(self, encoder=encoder, decoder=decoder)

    def with_dropout(self, rate: float) -> EncoderDecoderConfig:
        """With one rate wherever something is dropped, on both sides."""
        return dataclasses.replace(self, encoder=self.encoder.with_dropout(rate), decoder=self.decoder.with_dropout(rate))

    def empty_cache(self, batch: int, slots: int, cuts: tuple[int, ...] = ()) -> caches.Cache:
        """A cache for the decoder's tokens; `remember` puts into it what the encoder makes of its own."""
        return self.decoder.empty_cache(batch, slots, cuts)

    def construct(self, sites: Sites, cuts: tuple[int, ...] = ()) -> Callable[[nnx.Rngs], nnx.Module]:
        """`cuts` count the decoder's layers."""
        return lambda rngs: EncoderDecoder(self, sites, cuts, rngs)


class Trunk(nnx.Module):
    """The layers of one side."""

    def __init__(self, config: TransformerConfig, prefix: str, cross: bool, sites: Sites, cuts: tuple[int, ...], rngs: nnx.Rngs):
        layer = config.layer(cross=cross, prefix=prefix)
        self.relative, self.blocks, self.norm = trunk(config, layer, sites, cuts, rngs)


class EncoderDecoder(nnx.Module):
    """An embedding, the layers of both sides and a head, as an EncoderDecoderConfig has them."""

    def __init__(self, config: EncoderDecoderConfig, sites: Sites, cuts: tuple[int, ...], rngs: nnx.Rngs):
        c, d = config, config.decoder
        self.config = c
        self.embed = Embedding(d.vocab_size, d.width, sites, rngs, added=d.added)
        self.embed.table[...] = jax.random.normal(rngs.params(), (d.vocab_size, d.width))  # T5's start; a tied head scales it down
        self.encoder = Trunk(c.encoder, "encoder/", False, sites, (), rngs)
        self.decoder = Trunk(d, "decoder/", True, sites, cuts, rngs)
        self.head = Head(d.head, d.width, d.vocab_size, d.tied, d.added, sites, rngs)

    def __call__(self, batch: Batch, cache: caches.Cache | None, key: jax.Array | None):
        """(hidden_BTD, head, measures, cache); the decoder sees the encoder's tokens of its own segment."""
        d = self.config.decoder
        with jax.default_matmul_precision(d.precision):
            if cache is None:
                assert batch.inputs is not None, "An encoder-decoder needs batch.inputs."
                source_BSD, source_segments_BS = self._encode(batch.inputs, key), batch.inputs.segments
            else:
                assert cache.memory is not None, "An encoder-decoder's cache begins with `remember`."
                source_BSD, source_segments_BS = None, cache.memory_segments
            queries, known = (Marks(segments, jnp.zeros_like(segments)) for segments in (batch.segments, source_segments_BS))
            key = keys.fold(key, "decoder")
            x_BTD = self._embed(batch.tokens, None, d, key)
            x_BTD, measures, cache = transformer.run(
                d, self.decoder, x_BTD, batch.positions, batch.segments, cache, key, cross=Seen(queries, known), source=source_BSD
            )
            x_BTD = dropout(x_BTD, d.dropout, keys.fold(key, "out"))
            return x_BTD, self.head.bound(self.embed, d.precision, answer_key=key), measures, cache

    def remember(self, inputs: Inputs, cache: caches.Cache) -> caches.Cache:
        """The cache with the keys and values of all that the decoder's cross attention looks at."""
        with jax.default_matmul_precision(self.config.precision):
            source_BSD = self._encode(inputs, None)
            memory = self.decoder.blocks.each(lambda block: block.cross.memory(source_BSD, None))
        return dataclasses.replace(cache, memory=memory, memory_segments=inputs.segments)

    def _encode(self, inputs: Inputs, key: jax.Array | None) -> jax.Array:
        e, key = self.config.encoder, keys.fold(key, "encoder")
        x_BSD = self._embed(inputs.tokens, inputs.positions, e, key)
        x_BSD, _, _ = transformer.run(e, self.encoder, x_BSD, inputs.positions, inputs.segments, None, key)
        return dropout(x_BSD, e.dropout, keys.fold(key, "out"))

    def _embed(self, tokens: jax.Array, positions: jax.Array | None, c: TransformerConfig, key: jax.Array | None) -> jax.Array:
        x = self.embed(tokens, positions, jnp.dtype(c.dtype))
        return mesh.constrain(dropout(x, c.dropout, keys.fold(key, "embed")), "batch", "sequence", None)
