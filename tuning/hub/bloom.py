"""BLOOM (Le Scao et al., 2022, arXiv:2211.05100)."""

from __future__ import annotations

from typing import Any

from tuning.hub.falcon import PROJECTIONS
from tuning.hub.family import SPANS, Family, Raw, decoder_forms, refuse, renamed, size, tag_dropout, value
from tuning.hub.gpt2 import table
from tuning.models.transformer import TransformerConfig

OTHER_NAMES = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
TABLE = table(
    {"embed": "transformer.word_embeddings"},
    PROJECTIONS,
    {
        "embed_norm": "transformer.word_embeddings_layernorm", "norm": "transformer.ln_f",
        "attn_norm": "transformer.h.{layer}.input_layernorm", "mlp_norm": "transformer.h.{layer}.post_attention_layernorm",
    },
)  # fmt: skip


def read(raw: Raw) -> TransformerConfig:
    raw = renamed(raw, OTHER_NAMES)
    refuse(raw, "apply_residual_connection_post_layernorm", (False, None), "what is added to goes around the norms")
    refuse(raw, "slow_but_exact", (False, None), "projections are not computed in slices")
    width, heads = size(raw, "hidden_size"), size(raw, "n_head")
    return TransformerConfig(
        vocab_size=size(raw, "vocab_size"), width=width, layers=size(raw, "n_layer"), heads=heads, kv_heads=heads, head_dim=width // heads,
        hidden=4 * width, max_length=size(raw, "seq_length", 2048), positions="alibi", norm="layer",
        norm_eps=float(value(raw, "layer_norm_epsilon", 1e-5)), fused="groups", attention_bias=True, attention_out_bias=True,
        activation="gelu_tanh", gated=False, mlp_bias=True, embed_norm=True,
        dropout=float(value(raw, "hidden_dropout", 0.0)), dropped=("attn", "mlp"),
        attention_dropout=float(value(raw, "attention_dropout", 0.0)), tied=bool(value(raw, "tie_word_embeddings", True)),
    )  # fmt: skip


def write(c: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "seq_length": c.max_length,
        "layer_norm_epsilon": c.norm_eps,
        "attention_dropout": c.attention_dropout,
        "hidden_dropout": c.dropout,
        "tie_word_embeddings": c.tied,
    }


FORMS = {**decoder_forms("Bloom", classifier="classifier", rate=lambda raw: tag_dropout(raw, 0.0)), "BloomForQuestionAnswering": SPANS}
FAMILIES = {"bloom": Family(FORMS, read, write, TABLE, prefix="transformer.", ignored="")}
