"""Phi-3, Phi-3.5 and Phi-4."""

from __future__ import annotations

from typing import Any

from tuning.hub import llama
from tuning.hub.family import Family, Raw, decoder_forms, size, value
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

PROJECTIONS = {
    "attn/qkv": "self_attn.qkv_proj", "attn/o": "self_attn.o_proj", "mlp/gate_up": "mlp.gate_up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip


def read(raw: Raw) -> TransformerConfig:
    dropout = float(value(raw, "resid_pdrop", 0.0))  # the network has no place for embd_pdrop
    # The length that the model was first trained on stands beside the rotary numbers, and goes before one among them.
    original = {"original_max_position_embeddings": value(raw, "original_max_position_embeddings", 4096)}
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if (scaling.get("rope_type") or scaling.get("type")) == "yarn":  # as some of the first files call it
        scaling["rope_type"] = "longrope"
    c = llama.read(
        {**raw, **original, "rope_scaling": None, "rope_parameters": scaling}, eps=1e-5, partial=True, fused="parts", fused_mlp=True,
        kinds=(Kind(window=raw.get("sliding_window")),) * size(raw, "num_hidden_layers"), dropout=dropout,
    )  # fmt: skip
    if c.rope_scaling is not None:
        pairs = ((c.rotary_dim or c.head_dim) + 1) // 2
        counts = [len(c.rope_scaling.get(key, ())) for key in ("short_factor", "long_factor")]
        if counts != [pairs, pairs]:
            raise ValueError(f"config.json: rope_scaling={scaling} must have a short_factor and a long_factor with {pairs} numbers each.")
    return c.replace(dropped=("attn", "mlp")) if dropout else c


def write(c: TransformerConfig) -> dict[str, Any]:
    own = {"sliding_window": c.kinds[0].window, "resid_pdrop": c.dropout}
    original = (c.rope_scaling or {}).get("original_max_position_embeddings", c.max_length)
    return {**llama.write(c), **own, "original_max_position_embeddings": original}


FAMILIES = {"phi3": Family(decoder_forms("Phi3"), read, write, llama.table(PROJECTIONS))}
