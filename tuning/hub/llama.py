"""Llama 2 and 3, Mistral, Qwen 2 and Qwen 3, and what other families share with them."""

from __future__ import annotations

from typing import Any

from tuning.hub.family import Family, Raw, activation, activation_name, decoder_forms, rope, size, value, windows, write_rope, write_sizes
from tuning.hub.names import Row
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

PROJECTIONS = {
    "attn/q": "self_attn.q_proj", "attn/k": "self_attn.k_proj", "attn/v": "self_attn.v_proj", "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip
NORMS = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm",
}  # fmt: skip


def table(projections: dict[str, str] = PROJECTIONS, norms: dict[str, str] = NORMS) -> tuple[Row, ...]:
    """The tensors of a Llama-like body."""
    return (
        Row("embed/table", "model.embed_tokens.weight"),
        *(Row(f"{leaf}/kernel", f"model.layers.{{layer}}.{tensor}.weight", transposed=True) for leaf, tensor in projections.items()),
        *(Row(f"{leaf}/bias", f"model.layers.{{layer}}.{tensor}.bias") for leaf, tensor in projections.items()),
        *(Row(f"{leaf}/scale", f"model.layers.{{layer}}.{tensor}.weight") for leaf, tensor in norms.items()),
        Row("norm/scale", "model.norm.weight"),
    )


def read(
    raw: Raw, *, head_dim: int | None = None, kv_heads: int | None = None, act: str = "silu", theta: float = 10_000.0,
    eps: float = 1e-6, tied: bool = False, partial: bool = False, **features: Any,
) -> TransformerConfig:  # fmt: skip
    """What Llama-like families have in common; the keywords are the family's defaults, and the features that tell it apart.

    partial  whether only a part of each head may be rotated
    """
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    each = value(raw, "head_dim", head_dim or width // heads)
    turns = rope(raw, theta=theta)
    if turns.share != 1 and not partial:
        raise ValueError(f"config.json: partial_rotary_factor={turns.share} is not supported: this family rotates whole heads.")
    return TransformerConfig(
        **{
            "vocab_size": size(raw, "vocab_size"),
            "width": width,
            "layers": size(raw, "num_hidden_layers"),
            "heads": heads,
            "kv_heads": raw.get("num_key_value_heads", kv_heads) or heads,
            "head_dim": each,
            "hidden": size(raw, "intermediate_size"),
            "max_length": size(raw, "max_position_embeddings"),
            "rope_theta": turns.theta,
            "rope_scaling": turns.scaling,
            "rotary_dim": 0 if turns.share == 1 else int(each * turns.share),
            "norm_eps": float(value(raw, "rms_norm_eps", eps)),
            "activation": activation(raw, default=act),
            "attention_dropout": float(value(raw, "attention_dropout", 0.0)),
            "tied": bool(value(raw, "tie_word_embeddings", tied)),
            **features,
        }
    )


def write(c: TransformerConfig) -> dict[str, Any]:
    """The keys that `read` reads."""
    # Readers of either layout must find the rotary numbers: one that does not would take its default in silence.
    share = c.rotary_dim / c.head_dim if c.rotary_dim else 1.0
    parameters = write_rope(c.rope_theta, c.rope_scaling, share)
    return {
        **write_sizes(c),
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rope_scaling": {k: v for k, v in parameters.items() if k != "rope_theta"} if c.rope_scaling else None,
        "rope_parameters": parameters,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation_name(c.activation),
        "tie_word_embeddings": c.tied,
        "attention_dropout": c.attention_dropout,
    }


def read_llama(raw: Raw) -> TransformerConfig:
    if size(raw, "hidden_size") % size(raw, "num_attention_heads"):
        raise ValueError(
            f"config.json: a llama's hidden_size={raw['hidden_size']} is a multiple of its {raw['num_attention_heads']} heads."
        )
    bias, mlp_bias = bool(value(raw, "attention_bias", False)), bool(value(raw, "mlp_bias", False))
    return read(raw, attention_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias)


def read_mistral(raw: Raw) -> TransformerConfig:
    window = raw.get("sliding_window", 4096)  # an explicit null means none
    return read(raw, kv_heads=8, kinds=(Kind(window=window),) * size(raw, "num_hidden_layers"))


def read_qwen2(raw: Raw, **features: Any) -> TransformerConfig:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first, layers = value(raw, "max_window_layers", 28), size(raw, "num_hidden_layers")
    by_layer = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    every = tuple(Kind(window=w) for w in windows(raw, by_layer, window))
    return read(raw, **{"kv_heads": 32, "kinds": every, "attention_bias": True, **features})


def read_qwen3(raw: Raw, **features: Any) -> TransformerConfig:
    bias = bool(value(raw, "attention_bias", False))
    return read_qwen2(raw, head_dim=128, attention_bias=bias, attention_out_bias=bias, qk_norm="head", **features)


def write_llama(c: TransformerConfig) -> dict[str, Any]:
    return {**write(c), "attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def write_mistral(c: TransformerConfig) -> dict[str, Any]:
    return {**write(c), "sliding_window": c.kinds[0].window}


def write_qwen2(c: TransformerConfig) -> dict[str, Any]:
    window = next((kind.window for kind in c.kinds if kind.window is not None), None)
    kinds = ["full_attention" if kind.window is None else "sliding_attention" for kind in c.kinds]
    # One number says from which layer on there is a window; layer_types says it for any order.
    first = next((i for i, kind in enumerate(c.kinds) if kind.window), c.layers)
    sliding = dict(use_sliding_window=window is not None, sliding_window=window, max_window_layers=first)
    return {**write(c), **sliding, "layer_types": kinds}


def write_qwen3(c: TransformerConfig) -> dict[str, Any]:
    return {**write_qwen2(c), "attention_bias": c.attention_bias}


FAMILIES = {
    "llama": Family(decoder_forms("Llama"), read_llama, write_llama, table()),
    "mistral": Family(decoder_forms("Mistral"), read_mistral, write_mistral, table()),
    "qwen2": Family(decoder_forms("Qwen2"), read_qwen2, write_qwen2, table()),
    "qwen3": Family(decoder_forms("Qwen3"), read_qwen3, write_qwen3, table()),
}
