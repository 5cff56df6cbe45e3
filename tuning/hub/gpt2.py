"""GPT-2 (Radford et al., 2019), and what other families of its time share with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuning.hub.family import SPANS, Family, Raw, activation, activation_name, decoder_forms, refuse, renamed, size, value
from tuning.hub.names import Row
from tuning.models.transformer import TransformerConfig

OTHER_NAMES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
}  # fmt: skip
DROPPED = {"embed": "embd_pdrop", "attn": "resid_pdrop", "mlp": "resid_pdrop"}
NEUTRAL = {
    "scale_attn_weights": (True, "scores are divided by the root of the head's width"),
    "scale_attn_by_inverse_layer_idx": (False, "all layers scale their scores alike"),
    "reorder_and_upcast_attn": (False, "the softmax is always computed in float32"),
    "add_cross_attention": (False, "there is no encoder to attend to"),
}


def table(
    tables: Mapping[str, str], projections: Mapping[str, str], norms: Mapping[str, str], *, transposed: bool = True
) -> tuple[Row, ...]:
    """The tensors of a body whose projections and norms have biases, from {leaf: module}."""
    return (
        *(Row(f"{leaf}/table", f"{module}.weight") for leaf, module in tables.items()),
        *(Row(f"{leaf}/kernel", f"{module}.weight", transposed) for leaf, module in projections.items()),
        *(Row(f"{leaf}/scale", f"{module}.weight") for leaf, module in norms.items()),
        *(Row(f"{leaf}/bias", f"{module}.bias") for leaf, module in {**projections, **norms}.items()),
    )


TABLE = table(
    {"embed": "transformer.wte", "positions": "transformer.wpe"},
    {
        "attn/qkv": "transformer.h.{layer}.attn.c_attn", "attn/o": "transformer.h.{layer}.attn.c_proj",
        "mlp/up": "transformer.h.{layer}.mlp.c_fc", "mlp/down": "transformer.h.{layer}.mlp.c_proj",
    },
    {"attn_norm": "transformer.h.{layer}.ln_1", "mlp_norm": "transformer.h.{layer}.ln_2", "norm": "transformer.ln_f"},
    transposed=False,
)  # fmt: skip


def read(raw: Raw) -> TransformerConfig:
    raw = renamed(raw, OTHER_NAMES)
    for key, (neutral, why) in NEUTRAL.items():
        refuse(raw, key, (neutral,), why)
    width, heads = size(raw, "n_embd"), size(raw, "n_head")
    rates = {where: float(value(raw, key, 0.1)) for where, key in DROPPED.items()}
    if len(set(rates.values()) - {0.0}) > 1:
        raise ValueError(f"config.json: embd_pdrop={rates['embed']} and resid_pdrop={rates['attn']} must be the same, or one of them 0.")
    return TransformerConfig(
        vocab_size=size(raw, "vocab_size"), width=width, layers=size(raw, "n_layer"), heads=heads, kv_heads=heads, head_dim=width // heads,
        hidden=size(raw, "n_inner", 4 * width), max_length=size(raw, "n_positions"), positions="learned", norm="layer",
        norm_eps=float(value(raw, "layer_norm_epsilon", 1e-5)), fused="parts", attention_bias=True, attention_out_bias=True,
        activation=activation(raw, "activation_function", "gelu_new"), gated=False, mlp_bias=True,
        dropout=max(rates.values()), dropped=tuple(where for where, rate in rates.items() if rate or not any(rates.values())),
        attention_dropout=float(value(raw, "attn_pdrop", 0.1)), tied=bool(value(raw, "tie_word_embeddings", True)),
    )  # fmt: skip


def write(c: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "n_positions": c.max_length,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": activation_name(c.activation),
        **{key: c.dropout if where in c.dropped else 0.0 for where, key in DROPPED.items()},
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


FORMS = {**decoder_forms("GPT2", causal="LMHeadModel", classifier="classifier"), "GPT2ForQuestionAnswering": SPANS}
# Old files store the causal mask.
FAMILIES = {"gpt2": Family(FORMS, read, write, TABLE, prefix="transformer.", ignored=r"(^|\.)attn\.(bias|masked_bias)$")}
