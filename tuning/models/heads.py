"""Heads: what turns hidden states into logits over the vocabulary or over classes, or leaves them as they are.

Shapes: D width, V vocabulary, C classes, N added tokens, M rows of hidden states, "..." any leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys
from tuning.nn.dropout import dropout
from tuning.nn.linear import Embedding, Linear, fan_in
from tuning.nn.mlp import ACTIVATIONS
from tuning.nn.norm import Norm, normalise
from tuning.nn.sites import NOTHING, Project, Site, Sites, along_last

OUTPUTS = ("vocabulary", "classes", "spans", "hidden")
POOLS = ("", "first", "last", "mean")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head: hidden -> [dense -> activation -> norm] -> output -> [scale, softcap].

    output      one of OUTPUTS: logits over the vocabulary; over `classes`, by name; for the start and the end of an
                answer; or nothing more (the hidden state)
    pool        where a sequence has one answer: that of its "first" or "last" token, or of their "mean"; "" for an answer per token
    dense       a square projection before the output: its activation's name, or "" for none
    norm        after the dense projection; "" for none
    bias        of the output
    scale       of the hidden state before the output
    softcap     logits are cap * tanh(logit / cap); 0 for none
    dropout     of what the output reads; dense_dropout, of what the dense projection reads; both while training
    """

    output: str = "vocabulary"
    classes: tuple[str, ...] = ()
    pool: str = ""
    dense: str = ""
    dense_bias: bool = True
    norm: str = ""
    eps: float = 1e-5
    bias: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    dropout: float = 0.0
    dense_dropout: float = 0.0

    def __post_init__(self):
        if self.output not in OUTPUTS or self.pool not in POOLS:
            raise ValueError(f"A head's output={self.output!r} is one of {', '.join(OUTPUTS)}, its pool={self.pool!r} one of {POOLS}.")
        if (self.output == "classes") != bool(self.classes):
            raise ValueError(f"A head over {self.output} has {len(self.classes)} classes; only a head over classes names them.")

    def with_dropout(self, rate: float) -> HeadConfig:
        """With one rate wherever something is dropped."""
        return dataclasses.replace(self, dropout=rate, dense_dropout=rate)


LANGUAGE_MODEL = HeadConfig()


@dataclasses.dataclass(frozen=True)
class Output:
    """The projection that logits come from, as a method sees it: a Project whose results are float32."""

    kernel: jax.Array
    bias: jax.Array | None

    def times(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, self.kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.times(x)
        return y if self.bias is None else y + along_last(self.bias, y)


class Head(nnx.Module):
    """The weights of a head; those of a tied output are the embedding's."""

    def __init__(
        self, config: HeadConfig, width: int, vocab_size: int, tied: bool, added: tuple[int, int], sites: Sites, rngs: nnx.Rngs
    ):  # fmt: skip
        c = self.config = config
        speaks = c.output == "vocabulary"
        size = {"vocabulary": vocab_size, "classes": len(c.classes), "spans": 2, "hidden": 0}[c.output]
        own = size > 0 and not (speaks and tied)
        axis = "vocab" if speaks else None
        self.dense = (
            Linear(Site("head/dense", (width, width), ("embed", "norm"), range(0)), NOTHING, rngs, bias=c.dense_bias) if c.dense else None
        )
        self.norm = Norm(c.norm, width, c.eps) if c.norm else None
        self.kernel = nnx.Param(fan_in(rngs.params(), (width, size)), out_sharding=("embed", axis)) if own else None
        self.bias = nnx.Param(jnp.zeros(size), out_sharding=(axis,)) if c.bias else None
        self.added = nnx.Param(jnp.zeros((added[1], width)), out_sharding=(None, "embed")) if own and speaks and added[1] else None
        self.adapter = sites.head(Site("head", (width, size), ("embed", "vocab")), rngs) if own and speaks else None

    def bound(
        self, embedding: Embedding, precision: str, key: jax.Array | None = None, answer_key: jax.Array | None = None
    ) -> jax.tree_util.Partial:  # fmt: skip
        """The head as a value: a pytree whose leaves are its weights, so that a loss can differentiate with respect to them.

        key         turns on dropout, where the head has any
        answer_key  the same for what the method answers here
        """
        value = lambda param: None if param is None else param[...]  # noqa: E731
        tied = self.config.output == "vocabulary" and self.kernel is None
        answer = embedding.adapter if tied else self.adapter
        graph, leaves = (None, None) if answer is None else nnx.split(answer)
        weights = {
            "kernel": embedding.table[...].T if tied else value(self.kernel),
            "answer": leaves,
            "answer_key": None if answer is None else keys.fold(answer_key, "head/answer"),
            "added": value(embedding.added if tied else self.added),
            "bias": value(self.bias),
            "dense": None if self.dense is None else (self.dense.kernel[...], value(self.dense.bias)),
            "norm": None if self.norm is None else self.norm.weights,
            "key": keys.fold(key, "head") if self.config.dropout or self.config.dense_dropout else None,
        }
        return jax.tree_util.Partial(_bound(self.config, embedding.first, precision, graph, tied), weights)


@functools.cache  # one function per setting, so that jit recognises a head that it has seen
def _bound(config: HeadConfig, first: int, precision: str, graph: Any, tied: bool):
    return functools.partial(apply, config, first, precision, graph, tied)


def apply(
    c: HeadConfig, first: int, precision: str, graph: Any, tied: bool, weights: Mapping[str, Any], x: jax.Array
) -> jax.Array:  # fmt: skip
    """hidden [..., D] -> what the head says [..., V or C or D] in float32; added tokens take the places from `first` on.

    graph  of what the method answers, or None; weights["answer"] are its leaves
    """
    flat, key = x.reshape(-1, x.shape[-1]), weights["key"]
    with jax.default_matmul_precision(precision):
        if weights["dense"] is not None:
            flat = dropout(flat, c.dense_dropout, keys.fold(key, "dense"))
            flat = ACTIVATIONS[c.dense](Project(*weights["dense"])(flat))
        if weights["norm"] is not None:
            flat = normalise(c.norm, c.eps, flat, *weights["norm"])
        flat = dropout(flat, c.dropout, keys.fold(key, "output"))
        y = _output(c, first, graph, tied, weights, flat) if weights["kernel"] is not None else flat.astype(jnp.float32)
    return y.reshape(*x.shape[:-1], -1)


def _output(c: HeadConfig, first: int, graph: Any, tied: bool, weights: Mapping[str, Any], x_MD: jax.Array) -> jax.Array:
    if c.scale != 1:
        x_MD = x_MD * jnp.asarray(c.scale, x_MD.dtype)
    project = Output(weights["kernel"], weights["bias"])
    if graph is None:
        y = project(x_MD)
    else:
        with nnx.use_eager_sharding(False):
            answer = nnx.merge(graph, weights["answer"])
        y = (answer.output if tied else answer)(x_MD, project, weights["answer_key"])
    if (added_ND := weights["added"]) is not None:
        extra = jnp.matmul(x_MD, added_ND.T.astype(x_MD.dtype), preferred_element_type=jnp.float32)
        y = jnp.concatenate([y[:, :first], extra, y[:, first + added_ND.shape[0] :]], axis=-1)
    return c.softcap * jnp.tanh(y / c.softcap) if c.softcap else y
