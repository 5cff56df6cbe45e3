"""Recurrent networks: stacked LSTM or GRU layers as a language model, or as a classifier that may read both ways.

An embedding, the layers and a head, with nothing between them: the baseline of the years before attention, as torch.nn builds it
(Zaremba et al., 2014, arXiv:1409.2329). Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.core.types import Batch
from tuning.models.checks import check
from tuning.models.heads import LANGUAGE_MODEL, Head, HeadConfig
from tuning.models.transformer import mean_of_segments
from tuning.nn.linear import Embedding
from tuning.nn.recurrent import CELLS, Recurrent, RecurrentCache, empty
from tuning.nn.sites import Sites


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """A recurrent network's architecture, and how it computes.

    width          of the embedding
    hidden         width of a layer's state, in each direction
    cell           "lstm" or "gru"
    bidirectional  every layer reads both ways; not for a language model, which must not see what it is to say
    dropout        rate between layers while training
    max_length     of a row; the network itself has no limit
    head           what stands on top; tied, whether its output is the embedding
    added          (first id, count) of added tokens, whose rows are leaves of their own
    dtype          of the computation, "float32" or "bfloat16"; states are float32
    precision      of float32 matmuls on GPU and TPU, "highest" (exact) or "default" (fast)
    remat          what the backward pass keeps: "none" (all), "dots" (matmul results), "full" (only each layer's input)
    """

    vocab_size: int
    width: int
    hidden: int
    layers: int
    cell: str = "lstm"
    bidirectional: bool = False
    dropout: float = 0.0
    max_length: int = 1 << 20
    head: HeadConfig = LANGUAGE_MODEL
    tied: bool = False
    added: tuple[int, int] = (0, 0)
    dtype: str = "float32"
    precision: str = "highest"
    remat: str = "none"

    def __post_init__(self):
        check(self, ("vocab_size", "width", "hidden", "layers", "max_length"), {"cell": tuple(CELLS)})
        if not 0 <= self.dropout < 1 or (self.dropout and self.layers == 1):
            raise ValueError(f"dropout={self.dropout} lies in [0, 1) and acts between layers; there are layers={self.layers}. Set it to 0.")
        if self.bidirectional and self.head.output == "vocabulary":
            raise ValueError(
                "bidirectional=True: a language model that reads backward sees what it is to say. Set another head, or read forward."
            )
        if self.bidirectional and self.head.pool in ("first", "last"):
            raise ValueError(
                f"bidirectional=True: at the {self.head.pool} token one of the directions has read nothing else. Set head.pool='mean'."
            )
        if self.shares and self.hidden != self.width:
            raise ValueError(f"tied=True makes the embedding the head, which needs hidden={self.hidden} to be width={self.width}.")

    start = None  # no token stands before what it reads

    @property
    def vocabulary(self) -> int:
        """Token ids that are known: the table's rows, or more where added tokens lie beyond them."""
        return max(self.vocab_size, sum(self.added))

    @property
    def reads(self) -> str:
        """How text is laid out for it: "decoder" or "encoder"."""
        return "encoder" if self.bidirectional else "decoder"

    @property
    def shares(self) -> bool:
        """Whether the embedding is the head's matrix."""
        return self.tied and self.head.output == "vocabulary"

    def replace(self, **changes: Any) -> RecurrentConfig:
        """With some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_dropout(self, rate: float) -> RecurrentConfig:
        """With one rate wherever something is dropped."""
        return self.replace(dropout=rate, head=self.head.with_dropout(rate))

    def attention_flops(self, length: float) -> float:
        """There is no attention."""
        return 0.0

    def attention_on(self, platform: str, form: str = "auto", prefix: int = 0, length: int | None = None) -> tuple[str, str]:
        """Nor a form of it."""
        return "", "" if form == "auto" else "a recurrent network has no attention"

    def empty_cache(self, batch: int, slots: int, cuts: tuple[int, ...] = ()) -> RecurrentCache:
        """The states before the first token; they take the same room for any number of slots, and each layer is a segment of its own."""
        if self.bidirectional:
            raise ValueError("bidirectional=True: what a network that reads both ways says of a token depends on the tokens behind it. "
                             "Call the network on whole rows.")  # fmt: skip
        return empty(self.cell, batch, self.hidden, self.layers)

    def construct(self, sites: Sites, cuts: tuple[int, ...] = ()) -> Callable[[nnx.Rngs], nnx.Module]:
        """What `models.network.build` wants: a constructor that only needs random streams. Any cut is there already."""
        return lambda rngs: RecurrentNetwork(self, sites, rngs)


class RecurrentNetwork(nnx.Module):
    """An embedding, the recurrent layers and a head, as a RecurrentConfig has them."""

    def __init__(self, config: RecurrentConfig, sites: Sites, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width, sites, rngs, added=c.added)
        if not c.shares:
            # torch's start. No norm follows, and with the faint vectors that a transformer starts from the gates learn much more slowly.
            self.embed.table[...] = jax.random.normal(rngs.params(), (c.vocab_size, c.width))
        self.blocks = Recurrent(
            c.cell, c.width, c.hidden, c.layers, bidirectional=c.bidirectional, rate=c.dropout, precision=c.precision, remat=c.remat,
            sites=sites, rngs=rngs,
        )  # fmt: skip
        self.head = Head(c.head, c.hidden * (1 + c.bidirectional), c.vocab_size, c.tied, c.added, sites, rngs)

    def __call__(self, batch: Batch, cache: RecurrentCache | None, key: jax.Array | None):
        """(hidden_BTD, head, {}, cache); the state stays inside a segment, and passes over segment 0, padding."""
        c = self.config
        with jax.default_matmul_precision(c.precision):
            x_BTD = mesh.constrain(self.embed(batch.tokens, batch.positions, jnp.dtype(c.dtype)), "batch", None, None)
            x_BTD, read = self.blocks(x_BTD, batch.segments, keys.fold(key, "blocks"), cache)
            if c.head.pool == "mean":
                x_BTD = mean_of_segments(x_BTD, batch.segments)
            return x_BTD, self.head.bound(self.embed, c.precision, answer_key=key), {}, None if cache is None else read
