"""SmolLM3: a Llama that does not rotate queries and keys in every layer (SmolLM and SmolLM2 are of the family llama)."""

from __future__ import annotations

from typing import Any

from tuning.hub import llama
from tuning.hub.family import Family, Raw, decoder_forms, size, value, windows
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind


def read(raw: Raw) -> TransformerConfig:
    layers, interval = size(raw, "num_hidden_layers"), size(raw, "no_rope_layer_interval", 4)
    turned = value(raw, "no_rope_layers", [(i + 1) % interval != 0 for i in range(layers)])[:layers]
    if len(turned) < layers:
        raise ValueError(f"config.json: no_rope_layers={turned} says less than num_hidden_layers={layers} layers do.")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    default = ["full_attention" if window is None or turns else "sliding_attention" for turns in turned]
    kinds = tuple(Kind(near, "global" if turns else "") for near, turns in zip(windows(raw, default, window), turned, strict=True))
    bias, mlp_bias = bool(value(raw, "attention_bias", False)), bool(value(raw, "mlp_bias", False))
    return llama.read(
        raw, kv_heads=4, theta=2e6, tied=True, kinds=kinds, attention_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias
    )  # fmt: skip


def write(c: TransformerConfig) -> dict[str, Any]:
    turned = [int(kind.rope != "") for kind in c.kinds]
    return {**llama.write_qwen2(c), "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias, "no_rope_layers": turned}


FAMILIES = {"smollm3": Family(decoder_forms("SmolLM3"), read, write, llama.table())}
