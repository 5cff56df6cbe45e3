"""OLMo-2."""

from __future__ import annotations

from typing import Any

from tuning.hub import llama
from tuning.hub.family import Family, Raw, decoder_forms, value
from tuning.models.transformer import TransformerConfig

NORMS = {
    "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm",
    "attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm",
}  # fmt: skip


def read(raw: Raw) -> TransformerConfig:
    bias = bool(value(raw, "attention_bias", False))
    return llama.read(raw, eps=1e-5, order="within", qk_norm="whole", attention_bias=bias, attention_out_bias=bias)


def write(c: TransformerConfig) -> dict[str, Any]:
    return {**llama.write(c), "attention_bias": c.attention_bias}


# transformers has no OLMo-2 that classifies tokens.
FORMS = {name: form for name, form in decoder_forms("Olmo2").items() if "Token" not in name}
FAMILIES = {"olmo2": Family(FORMS, read, write, llama.table(norms=NORMS))}
