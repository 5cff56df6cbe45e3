"""GPT-NeoX and Pythia (Black et al., 2022, arXiv:2204.06745)."""

from __future__ import annotations

from typing import Any

from tuning.hub.family import SPANS, Family, Raw, activation, activation_name, decoder_forms, rope, size, value, write_rope, write_sizes
from tuning.hub.gpt2 import table
from tuning.models.transformer import TransformerConfig

TABLE = table(
    {"embed": "gpt_neox.embed_in"},
    {
        "attn/qkv": "gpt_neox.layers.{layer}.attention.query_key_value", "attn/o": "gpt_neox.layers.{layer}.attention.dense",
        "mlp/up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "mlp/down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
    },
    {
        "attn_norm": "gpt_neox.layers.{layer}.input_layernorm", "mlp_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "norm": "gpt_neox.final_layer_norm",
    },
)  # fmt: skip


def read(raw: Raw) -> TransformerConfig:
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    bias = bool(value(raw, "attention_bias", True))
    # This family's own names for the two; under the usual ones transformers does not look for them.
    turns = rope({**raw, "rope_theta": raw.get("rotary_emb_base"), "partial_rotary_factor": raw.get("rotary_pct")}, share=0.25)
    rotary_dim = int(width // heads * turns.share)
    if not rotary_dim:
        raise ValueError(f"config.json: rotary_pct={turns.share} is not supported: of a head's {width // heads} numbers it turns none.")
    return TransformerConfig(
        vocab_size=size(raw, "vocab_size"), width=width, layers=size(raw, "num_hidden_layers"), heads=heads, kv_heads=heads,
        head_dim=width // heads, hidden=size(raw, "intermediate_size"), max_length=size(raw, "max_position_embeddings"),
        order="parallel" if value(raw, "use_parallel_residual", True) else "before", norm="layer",
        norm_eps=float(value(raw, "layer_norm_eps", 1e-5)), rope_theta=turns.theta, rope_scaling=turns.scaling,
        rotary_dim=0 if turns.share == 1 else rotary_dim, fused="groups", attention_bias=bias, attention_out_bias=bias,
        activation=activation(raw, default="gelu"), gated=False, mlp_bias=True,
        dropout=float(value(raw, "hidden_dropout", 0.0)), attention_dropout=float(value(raw, "attention_dropout", 0.0)),
        tied=bool(value(raw, "tie_word_embeddings", False)),
    )  # fmt: skip


def write(c: TransformerConfig) -> dict[str, Any]:
    # Readers of either layout must find the rotary numbers: one that does not would take its default in silence.
    share = (c.rotary_dim or c.head_dim) / c.head_dim
    parameters = {**write_rope(c.rope_theta, c.rope_scaling), "partial_rotary_factor": share}
    return {
        **write_sizes(c),
        "max_position_embeddings": c.max_length,
        "use_parallel_residual": c.order == "parallel",
        "layer_norm_eps": c.norm_eps,
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": share,
        "rope_scaling": {key: number for key, number in parameters.items() if key != "rope_theta"} if c.rope_scaling else None,
        "rope_parameters": parameters,
        "attention_bias": c.attention_bias,
        "hidden_act": activation_name(c.activation),
        "hidden_dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
    }


RATE = lambda raw: float(value(raw, "classifier_dropout", 0.1))  # noqa: E731
FORMS = {**decoder_forms("GPTNeoX", head="embed_out", classifier="classifier", rate=RATE), "GPTNeoXForQuestionAnswering": SPANS}
# Old files store the causal mask and the rotary frequencies.
IGNORED = r"(^|\.)attention\.(bias|masked_bias|rotary_emb\.inv_freq)$"
FAMILIES = {"gpt_neox": Family(FORMS, read, write, TABLE, prefix="gpt_neox.", ignored=IGNORED)}
