"""ModernBERT: an encoder with rotary positions, gated feed-forward layers and, in most layers, local attention."""

from __future__ import annotations

import functools
from typing import Any

from tuning.hub.bert import linear, norm, widths
from tuning.hub.family import (
    Family,
    Form,
    Raw,
    activation,
    activation_name,
    bare,
    layer_kinds,
    refuse,
    rope,
    size,
    sorts,
    spans,
    speaks,
    value,
    write_rope,
    write_sizes,
)
from tuning.hub.names import Row
from tuning.models.heads import HeadConfig
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

LAYERS = ("full_attention", "sliding_attention")
POOLS = {"cls": "first", "mean": "mean"}
LAYER = {"attn/qkv": "attn.Wqkv", "attn/o": "attn.Wo", "mlp/gate_up": "mlp.Wi", "mlp/down": "mlp.Wo"}
TABLE = (
    Row("embed/table", "model.embeddings.tok_embeddings.weight"),
    *norm("embed_norm", "model.embeddings.norm"),
    *(row for leaf, tensor in LAYER.items() for row in linear(leaf, f"model.layers.{{layer}}.{tensor}")),
    *(row for leaf in ("attn_norm", "mlp_norm") for row in norm(leaf, f"model.layers.{{layer}}.{leaf}")),
    *norm("norm", "model.final_norm"),
)


def _norms(raw: Raw) -> str:
    return "layer" if value(raw, "norm_bias", False) else "layer_unbiased"


def _head(make: Any, raw: Raw, **settings: Any) -> HeadConfig:
    """`make`, with the dense projection and the norm that all of its heads have."""
    dense = dict(dense=activation(raw, "classifier_activation", "gelu"), dense_bias=bool(value(raw, "classifier_bias", False)))
    return make(raw, **dense, norm=_norms(raw), eps=float(value(raw, "norm_eps", 1e-5)), **settings)


def _sorts(raw: Raw, make: Any = sorts, **settings: Any) -> HeadConfig:
    return _head(make, raw, bias=True, dropout=float(value(raw, "classifier_dropout", 0.0)), **settings)


def _sequence(raw: Raw) -> HeadConfig:
    how = value(raw, "classifier_pooling", "cls")
    if how not in POOLS:
        raise ValueError(f"config.json: classifier_pooling={how!r} is not one of {', '.join(POOLS)}.")
    return _sorts(raw, pool=POOLS[how])


def _forms() -> dict[str, Form]:
    dense = (*linear("head/dense", "head.dense"), *norm("head/norm", "head.norm"))
    classifier = (*dense, *linear("head", "classifier"))
    return {
        "ModernBertForMaskedLM": Form(
            lambda raw: _head(speaks, raw, bias=bool(value(raw, "decoder_bias", True))), (*dense, *linear("head", "decoder"))
        ),
        "ModernBertForSequenceClassification": Form(_sequence, classifier),
        "ModernBertForTokenClassification": Form(_sorts, classifier),
        "ModernBertForQuestionAnswering": Form(functools.partial(_sorts, make=spans), classifier),
        "ModernBertModel": Form(bare, bare=True),
    }


def _kinds(raw: Raw) -> tuple[Kind, ...]:
    every = size(raw, "global_attn_every_n_layers", 3)
    layers = layer_kinds(raw, LAYERS, [LAYERS[i % every > 0] for i in range(size(raw, "num_hidden_layers"))])
    # Half of `local_attention` on either side, and the token itself.
    kinds = {LAYERS[0]: Kind(), LAYERS[1]: Kind(window=size(raw, "local_attention", 128) // 2 + 1, rope="local")}
    # The first layer follows the norm of the embedding.
    return tuple(kinds[name] if i else Kind(kinds[name].window, kinds[name].rope, attn_norm=False) for i, name in enumerate(layers))


def _rope(raw: Raw) -> dict[str, Any]:
    """Either layout; in the older one, local_rope_theta=null means that of the global layers."""
    refuse(raw, "rope_scaling", (None, {}), "name the kind of layers that it is for in rope_parameters")
    wide = value(raw, "global_rope_theta", 160_000.0)
    defaults = {LAYERS[0]: wide, LAYERS[1]: value(raw, "local_rope_theta", wide) if "local_rope_theta" in raw else 10_000.0}
    said = raw.get("rope_parameters") or {}
    if set(said) - set(LAYERS):
        raise ValueError(f"config.json: rope_parameters={said} must have an entry for {' and for '.join(LAYERS)}.")
    longest = {"max_position_embeddings": raw.get("max_position_embeddings")}
    turns = [rope({"rope_parameters": said.get(name) or {}, **longest}, theta=theta) for name, theta in defaults.items()]
    if turns[1].scaling or any(turn.share != 1 for turn in turns):
        raise ValueError(f"config.json: rope_parameters={said}: local layers are not scaled, and heads are rotated whole.")
    return dict(rope_theta=turns[0].theta, rope_scaling=turns[0].scaling, local_theta=turns[1].theta)


def _dropout(raw: Raw) -> dict[str, Any]:
    """After the embedding, of the attention shares and after attention; nothing is dropped after the feed-forward layer."""
    embed, attention = (float(value(raw, key, 0.0)) for key in ("embedding_dropout", "attention_dropout"))
    if embed and attention and embed != attention:
        raise ValueError(f"config.json: embedding_dropout={embed} and attention_dropout={attention} must be the same, or one of them 0.")
    dropped = tuple(name for name, rate, other in (("embed", embed, attention), ("attn", attention, embed)) if rate or not other)
    inside = float(value(raw, "mlp_dropout", 0.0))
    return dict(dropout=max(embed, attention), dropped=dropped, attention_dropout=attention, mlp_dropout=inside)


def _read(raw: Raw) -> TransformerConfig:
    bias = bool(value(raw, "attention_bias", False))
    return TransformerConfig(
        **widths(raw, "hidden_size", "num_attention_heads"),
        **_rope(raw),
        **_dropout(raw),
        causal=False,
        kinds=_kinds(raw),
        vocab_size=size(raw, "vocab_size"),
        layers=size(raw, "num_hidden_layers"),
        hidden=size(raw, "intermediate_size"),
        max_length=size(raw, "max_position_embeddings"),
        norm=_norms(raw),
        norm_eps=float(value(raw, "norm_eps", 1e-5)),
        fused="parts",
        attention_bias=bias,
        attention_out_bias=bias,
        activation=activation(raw, "hidden_activation", "gelu"),
        fused_mlp=True,
        mlp_bias=bool(value(raw, "mlp_bias", False)),
        embed_norm=True,
        tied=bool(value(raw, "tie_word_embeddings", True)),
    )


def _write(c: TransformerConfig) -> dict[str, Any]:
    layers = [LAYERS[kind.rope == "local"] for kind in c.kinds]
    # Readers of the older layout know a number only, and no other order of the layers.
    every = [n for n in range(1, c.layers + 1) if layers == [LAYERS[i % n > 0] for i in range(c.layers)]]
    window = max((kind.window or 0 for kind in c.kinds if kind.rope == "local"), default=65)
    head = c.head
    return {
        **write_sizes(c),
        "max_position_embeddings": c.max_length,
        "hidden_activation": activation_name(c.activation),
        "norm_eps": c.norm_eps,
        "norm_bias": c.norm == "layer",
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "layer_types": layers,
        **({"global_attn_every_n_layers": every[0]} if every else {}),
        "local_attention": 2 * (window - 1),
        "global_rope_theta": c.rope_theta,
        "local_rope_theta": c.local_theta,
        "rope_parameters": {LAYERS[0]: write_rope(c.rope_theta, c.rope_scaling), LAYERS[1]: write_rope(c.local_theta, None)},
        "embedding_dropout": c.dropout if "embed" in c.dropped else 0.0,
        "attention_dropout": c.attention_dropout,
        "mlp_dropout": c.mlp_dropout,
        "classifier_pooling": "mean" if head.pool == "mean" else "cls",
        "classifier_bias": head.dense_bias and bool(head.dense),
        "classifier_activation": activation_name(head.dense or "gelu"),
        "classifier_dropout": head.dropout,
        "decoder_bias": head.bias or head.output != "vocabulary",
        "tie_word_embeddings": c.tied,
    }


FAMILIES = {"modernbert": Family(_forms(), _read, _write, TABLE)}
