"""Falcon (Almazrouei et al., 2023, arXiv:2311.16867): 7B, 40B, 11B and the older RW models.

Its config.json describes two architectures. In the old one keys belong to all queries or each query has its own, and layers are parallel
with one norm, or sequential. In the new one queries share keys in groups, and layers are parallel with two norms, or with one.
"""

from __future__ import annotations

from typing import Any

from tuning.hub.family import (
    SPANS,
    Family,
    Raw,
    activation,
    activation_name,
    decoder_forms,
    refuse,
    renamed,
    rope,
    size,
    tag_dropout,
    value,
    write_rope,
)
from tuning.hub.gpt2 import table
from tuning.hub.names import Row
from tuning.models.transformer import TransformerConfig

PROJECTIONS = {
    "attn/qkv": "transformer.h.{layer}.self_attention.query_key_value", "attn/o": "transformer.h.{layer}.self_attention.dense",
    "mlp/up": "transformer.h.{layer}.mlp.dense_h_to_4h", "mlp/down": "transformer.h.{layer}.mlp.dense_4h_to_h",
}  # fmt: skip
LONGEST = 2048  # max_position_embeddings where it is not said


def order(raw: Raw) -> str:
    """How its layers are normalised, one of tuning.nn.block.ORDERS."""
    new, parallel = bool(value(raw, "new_decoder_architecture", False)), bool(value(raw, "parallel_attn", True))
    norms = value(raw, "num_ln_in_parallel_attn", 2 if new else 1)
    if new and parallel and norms in (1, 2):
        return "parallel" if norms == 2 else "parallel_one"
    if new or (parallel and norms == 2):
        raise ValueError(
            f"config.json: parallel_attn={parallel} and num_ln_in_parallel_attn={norms} do not go with new_decoder_architecture={new}: "
            "the new one is parallel with 1 or 2 norms, the old one with 1."
        )
    return "parallel_one" if parallel else "before"


def tensors(raw: Raw) -> tuple[Row, ...]:
    """The tensors of a body."""
    norms = ("ln_attn", "ln_mlp") if order(raw) == "parallel" else ("input_layernorm", "post_attention_layernorm")
    within = {leaf: f"transformer.h.{{layer}}.{norm}" for leaf, norm in zip(("attn_norm", "mlp_norm"), norms, strict=True)}
    return table({"embed": "transformer.word_embeddings"}, PROJECTIONS, {**within, "norm": "transformer.ln_f"})


def read(raw: Raw) -> TransformerConfig:
    raw = renamed(raw, {"n_embed": "hidden_size"})
    for key in ("hidden_dropout", "attention_dropout"):
        refuse(raw, key, (0, None), "Falcon drops in places of its own. Set it to 0")
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    kv_heads = size(raw, "num_kv_heads", heads)
    if not value(raw, "new_decoder_architecture", False):
        kv_heads = 1 if value(raw, "multi_query", True) else heads
    bias, longest = bool(value(raw, "bias", False)), size(raw, "max_position_embeddings", LONGEST)
    turns = rope({**raw, "max_position_embeddings": longest})
    return TransformerConfig(
        vocab_size=size(raw, "vocab_size"), width=width, layers=size(raw, "num_hidden_layers"), heads=heads, kv_heads=kv_heads,
        head_dim=width // heads, hidden=size(raw, "ffn_hidden_size", 4 * width), max_length=longest, order=order(raw), norm="layer",
        norm_eps=float(value(raw, "layer_norm_epsilon", 1e-5)), positions="alibi_keys" if value(raw, "alibi", False) else "rotary",
        rope_theta=turns.theta, rope_scaling=turns.scaling, fused="groups", attention_bias=bias, attention_out_bias=bias,
        activation=activation(raw, "activation", "gelu"), gated=False, mlp_bias=bias, tied=bool(value(raw, "tie_word_embeddings", True)),
    )  # fmt: skip


def write(c: TransformerConfig) -> dict[str, Any]:
    new = c.order == "parallel" or c.kv_heads not in (1, c.heads)
    parameters = write_rope(c.rope_theta, c.rope_scaling)
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_kv_heads": c.kv_heads,
        "multi_query": c.kv_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": c.order != "before",
        "num_ln_in_parallel_attn": 2 if c.order == "parallel" else 1,
        "ffn_hidden_size": c.hidden,
        "max_position_embeddings": c.max_length,
        "layer_norm_epsilon": c.norm_eps,
        "alibi": c.positions == "alibi_keys",
        "rope_theta": c.rope_theta,
        "rope_scaling": {key: number for key, number in parameters.items() if key != "rope_theta"} if c.rope_scaling else None,
        "rope_parameters": parameters,
        "bias": c.attention_bias,
        "activation": activation_name(c.activation),
        "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


FORMS = {**decoder_forms("Falcon", classifier="classifier", rate=lambda raw: tag_dropout(raw, 0.0)), "FalconForQuestionAnswering": SPANS}
FAMILIES = {"falcon": Family(FORMS, read, write, tensors, prefix="transformer.")}
