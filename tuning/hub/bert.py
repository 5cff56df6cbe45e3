"""BERT (and MiniLM, which is one), RoBERTa, XLM-RoBERTa and DistilBERT."""

from __future__ import annotations

import functools
from typing import Any

from tuning.hub.family import Family, Form, Raw, activation, activation_name, bare, refuse, size, sorts, spans, speaks, value, write_sizes
from tuning.hub.names import Row
from tuning.models.heads import HeadConfig
from tuning.models.transformer import TransformerConfig

IGNORED = r"(^|\.)embeddings\.position_ids$"  # 0, 1, 2, ...
ENCODER = dict(
    causal=False, order="after", norm="layer", final_norm=False, positions="learned", attention_bias=True, attention_out_bias=True,
    gated=False, mlp_bias=True, embed_norm=True,
)  # fmt: skip


def linear(leaf: str, tensor: str) -> tuple[Row, ...]:
    """A projection with its bias, which may be missing."""
    return Row(f"{leaf}/kernel", f"{tensor}.weight", transposed=True), Row(f"{leaf}/bias", f"{tensor}.bias")


def norm(leaf: str, tensor: str) -> tuple[Row, ...]:
    """A LayerNorm with its bias, which may be missing."""
    return Row(f"{leaf}/scale", f"{tensor}.weight"), Row(f"{leaf}/bias", f"{tensor}.bias")


def table(prefix: str, layers: str, parts: dict[str, str]) -> tuple[Row, ...]:
    """The tensors of a body; `parts` tells what a layer's are called."""
    tables = {"embed": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
    named = {leaf: f"{prefix}{layers}.{{layer}}.{tensor}" for leaf, tensor in parts.items()}
    return (
        *(Row(f"{leaf}/table", f"{prefix}embeddings.{tensor}.weight") for leaf, tensor in tables.items()),
        *norm("embed_norm", f"{prefix}embeddings.LayerNorm"),
        *(row for leaf, tensor in named.items() for row in (norm if leaf.endswith("_norm") else linear)(leaf, tensor)),
    )


BERT_LAYER = {
    "attn/q": "attention.self.query", "attn/k": "attention.self.key", "attn/v": "attention.self.value", "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm", "mlp/up": "intermediate.dense", "mlp/down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
DISTILBERT_LAYER = {
    "attn/q": "attention.q_lin", "attn/k": "attention.k_lin", "attn/v": "attention.v_lin", "attn/o": "attention.out_lin",
    "attn_norm": "sa_layer_norm", "mlp/up": "ffn.lin1", "mlp/down": "ffn.lin2", "mlp_norm": "output_layer_norm",
}  # fmt: skip


# Heads.


def _fills(raw: Raw, act: str = "") -> HeadConfig:
    # Untied, transformers keeps two biases of which it uses one.
    refuse(raw, "tie_word_embeddings", (True, None), "its masked language model shares the embedding")
    return speaks(raw, dense=act or activation(raw, default="gelu"), norm="layer", eps=_eps(raw), bias=True)


def _rate(raw: Raw) -> float:
    return float(value(raw, "classifier_dropout", value(raw, "hidden_dropout_prob", 0.1)))


def _sorts(raw: Raw, **settings: Any) -> HeadConfig:
    return sorts(raw, bias=True, dropout=_rate(raw), **settings)


def _pooled(raw: Raw) -> HeadConfig:
    """The answer at the first token stands for the text, as `pooler_output`; the hidden states are there before the head."""
    return HeadConfig(output="hidden", pool="first", dense="tanh")


def _eps(raw: Raw) -> float:
    return float(value(raw, "layer_norm_eps", 1e-12))


def _bert_forms() -> dict[str, Form]:
    transform = "cls.predictions.transform"
    words = (
        *linear("head/dense", f"{transform}.dense"), *norm("head/norm", f"{transform}.LayerNorm"),
        Row("head/kernel", "cls.predictions.decoder.weight", transposed=True), Row("head/bias", "cls.predictions.bias"),
    )  # fmt: skip
    pooler, first = linear("head/dense", "bert.pooler.dense"), functools.partial(_sorts, pool="first", dense="tanh")
    return {
        "BertForMaskedLM": Form(_fills, words),
        "BertForPreTraining": Form(_fills, words, saved="BertForMaskedLM"),
        "BertForSequenceClassification": Form(first, (*pooler, *linear("head", "classifier"))),
        "BertForNextSentencePrediction": Form(
            functools.partial(sorts, bias=True, pool="first", dense="tanh"), (*pooler, *linear("head", "cls.seq_relationship"))
        ),
        "BertForTokenClassification": Form(_sorts, linear("head", "classifier")),
        "BertForQuestionAnswering": Form(spans, linear("head", "qa_outputs")),
        "BertModel": Form(_pooled, linear("head/dense", "pooler.dense"), bare=True),
    }


def _roberta_forms(name: str) -> dict[str, Form]:
    words = (
        *linear("head/dense", "lm_head.dense"), *norm("head/norm", "lm_head.layer_norm"),
        Row("head/kernel", "lm_head.decoder.weight", transposed=True), Row("head/bias", "lm_head.bias"),
    )  # fmt: skip
    first = lambda raw: _sorts(raw, pool="first", dense="tanh", dense_dropout=_rate(raw))  # noqa: E731
    return {
        f"{name}ForMaskedLM": Form(functools.partial(_fills, act="gelu"), words),
        f"{name}ForSequenceClassification": Form(
            first, (*linear("head/dense", "classifier.dense"), *linear("head", "classifier.out_proj"))
        ),
        f"{name}ForTokenClassification": Form(_sorts, linear("head", "classifier")),
        f"{name}ForQuestionAnswering": Form(spans, linear("head", "qa_outputs")),
        f"{name}Model": Form(_pooled, linear("head/dense", "pooler.dense"), bare=True),
    }


def _distilbert_forms() -> dict[str, Form]:
    said = lambda raw: speaks(raw, dense=activation(raw, "activation", "gelu"), norm="layer", eps=1e-12, bias=True)  # noqa: E731
    words = (
        *linear("head/dense", "vocab_transform"), *norm("head/norm", "vocab_layer_norm"), *linear("head", "vocab_projector"),
    )  # fmt: skip
    rate = lambda raw, key, default: float(value(raw, key, default))  # noqa: E731
    first = lambda raw: sorts(raw, pool="first", dense="relu", bias=True, dropout=rate(raw, "seq_classif_dropout", 0.2))  # noqa: E731
    return {
        "DistilBertForMaskedLM": Form(said, words),
        "DistilBertForSequenceClassification": Form(first, (*linear("head/dense", "pre_classifier"), *linear("head", "classifier"))),
        "DistilBertForTokenClassification": Form(
            lambda raw: sorts(raw, bias=True, dropout=rate(raw, "dropout", 0.1)), linear("head", "classifier")
        ),
        "DistilBertForQuestionAnswering": Form(lambda raw: spans(raw, dropout=rate(raw, "qa_dropout", 0.1)), linear("head", "qa_outputs")),
        "DistilBertModel": Form(bare, bare=True),
    }


# Bodies.


def widths(raw: Raw, width: str, heads: str) -> dict[str, Any]:
    """The sizes of a body whose heads share its width."""
    if size(raw, width) % size(raw, heads):
        raise ValueError(f"config.json: {width}={raw[width]} must be a multiple of {heads}={raw[heads]}.")
    return dict(width=raw[width], heads=raw[heads], kv_heads=raw[heads], head_dim=raw[width] // raw[heads])


def _read(raw: Raw, offset: int = 0) -> TransformerConfig:
    for key in ("is_decoder", "add_cross_attention"):
        refuse(raw, key, (False, None), "it is read as an encoder, where a token sees all others")
    refuse(raw, "position_embedding_type", ("absolute", None), "positions enter through a table only")
    if size(raw, "type_vocab_size", 2) < 1:
        raise ValueError(f"config.json: type_vocab_size={raw['type_vocab_size']} must be at least 1.")
    return TransformerConfig(
        **ENCODER,
        **widths(raw, "hidden_size", "num_attention_heads"),
        vocab_size=size(raw, "vocab_size"),
        layers=size(raw, "num_hidden_layers"),
        hidden=size(raw, "intermediate_size"),
        max_length=size(raw, "max_position_embeddings") - offset,
        position_offset=offset,
        type_count=size(raw, "type_vocab_size", 2),
        norm_eps=_eps(raw),
        activation=activation(raw, default="gelu"),
        dropout=float(value(raw, "hidden_dropout_prob", 0.1)),
        attention_dropout=float(value(raw, "attention_probs_dropout_prob", 0.1)),
        tied=bool(value(raw, "tie_word_embeddings", True)),
    )


def _read_roberta(raw: Raw) -> TransformerConfig:
    return _read(raw, size(raw, "pad_token_id", 1) + 1)  # a position's number is its place behind that of padding


def _read_distilbert(raw: Raw) -> TransformerConfig:
    return TransformerConfig(
        **ENCODER,
        **widths(raw, "dim", "n_heads"),
        vocab_size=size(raw, "vocab_size"),
        layers=size(raw, "n_layers"),
        hidden=size(raw, "hidden_dim"),
        max_length=size(raw, "max_position_embeddings"),
        norm_eps=1e-12,
        activation=activation(raw, "activation", "gelu"),
        dropout=float(value(raw, "dropout", 0.1)),
        dropped=("embed", "mlp"),
        attention_dropout=float(value(raw, "attention_dropout", 0.1)),
        tied=bool(value(raw, "tie_word_embeddings", True)),
    )


def _write(c: TransformerConfig) -> dict[str, Any]:
    return {
        **write_sizes(c),
        "hidden_act": activation_name(c.activation),
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
        "classifier_dropout": c.head.dropout if c.head.output == "classes" else None,
        "max_position_embeddings": c.max_length + c.position_offset,
        "type_vocab_size": c.type_count,
        "layer_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
    }


def _write_roberta(c: TransformerConfig) -> dict[str, Any]:
    return {**_write(c), "pad_token_id": c.position_offset - 1}


def _write_distilbert(c: TransformerConfig) -> dict[str, Any]:
    rate = {"classes": "seq_classif_dropout", "spans": "qa_dropout"}.get(c.head.output) if c.head.pool or c.head.output == "spans" else None
    return {
        "vocab_size": c.vocab_size,
        "dim": c.width,
        "n_layers": c.layers,
        "n_heads": c.heads,
        "hidden_dim": c.hidden,
        "activation": activation_name(c.activation),
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        **({rate: c.head.dropout} if rate else {}),
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": c.tied,
    }


def _roberta(name: str) -> Family:
    aliases = {"lm_head.decoder.bias": "lm_head.bias"}
    return Family(_roberta_forms(name), _read_roberta, _write_roberta, ROBERTA, "roberta.", aliases, IGNORED)


BERT, ROBERTA = (table(prefix, "encoder.layer", BERT_LAYER) for prefix in ("bert.", "roberta."))
DISTILBERT = table("distilbert.", "transformer.layer", DISTILBERT_LAYER)
FAMILIES = {
    "bert": Family(_bert_forms(), _read, _write, BERT, "bert.", {"cls.predictions.decoder.bias": "cls.predictions.bias"}, IGNORED),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "distilbert": Family(_distilbert_forms(), _read_distilbert, _write_distilbert, DISTILBERT, "distilbert.", ignored=IGNORED),
}
