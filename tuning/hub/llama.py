"""Llama 2 and 3, Mistral, Qwen 2 and Qwen 3: how their config.json reads as a DecoderConfig, and what their tensors are called.

Keys, defaults and meaning are those of transformers' configuration classes. Both layouts are read: `rope_theta`, `rope_scaling` and
`torch_dtype` of transformers 4, and `rope_parameters` and `dtype` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuning.hub.names import Row
from tuning.models.decoder import DecoderConfig
from tuning.nn.mlp import ACTIVATIONS

PROJECTIONS = {
    "attn/q": "self_attn.q_proj", "attn/k": "self_attn.k_proj", "attn/v": "self_attn.v_proj", "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip
SCALES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm",
}  # fmt: skip

TABLE = (
    Row("embed/table", "model.embed_tokens.weight"),
    *(Row(f"{leaf}/kernel", f"model.layers.{{layer}}.{tensor}.weight", transposed=True) for leaf, tensor in PROJECTIONS.items()),
    *(Row(f"{leaf}/bias", f"model.layers.{{layer}}.{tensor}.bias") for leaf, tensor in PROJECTIONS.items()),
    *(Row(f"{leaf}/scale", f"model.layers.{{layer}}.{tensor}.weight") for leaf, tensor in SCALES.items()),
    Row("norm/scale", "model.norm.weight"),
    Row("head/kernel", "lm_head.weight", transposed=True),
)

Raw = Mapping[str, Any]  # config.json as it was read

SILU = ("silu", "swish")
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _common(raw: Raw, *, head_dim: int | None, kv_heads: int | None, **features: Any) -> DecoderConfig:
    """What the four have in common. The features are those that tell them apart. ValueError for what the decoder cannot do."""
    act = _value(raw, "hidden_act", "silu")
    act = "silu" if act in SILU else act
    if act not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={act!r} is not supported; known are {', '.join(ACTIVATIONS)}.")
    refuse(raw, "attention_dropout", (0, None), "there is no dropout inside attention")
    width, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    theta, scaling = _rope(raw)
    return DecoderConfig(
        vocab_size=_size(raw, "vocab_size"),
        width=width,
        layers=_size(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads", kv_heads) or heads,
        head_dim=_value(raw, "head_dim", head_dim or width // heads),
        hidden=_size(raw, "intermediate_size"),
        max_length=_size(raw, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(_value(raw, "rms_norm_eps", 1e-6)),
        activation=act,
        tied=bool(_value(raw, "tie_word_embeddings", False)),
        **features,
    )


def _rope(raw: Raw) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of either layout. A `rope_scaling` that is not empty comes before `rope_parameters`, as in transformers."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config.json: rope_parameters={dict(rope)} differ between layers, which is not supported yet.")
    for where in (raw, rope):
        refuse(where, "partial_rotary_factor", (1, None), "rotary positions turn the whole head")
    theta = float(_value(rope, "rope_theta", _value(raw, "rope_theta", 10_000.0)))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known are {', '.join(ROPE_KEYS)}.")
    if kind == "default":
        return theta, None
    original = _value(
        raw, "original_max_position_embeddings", _value(rope, "original_max_position_embeddings", raw["max_position_embeddings"])
    )
    numbers = {**rope, "original_max_position_embeddings": original}
    if absent := [key for key in ROPE_KEYS[kind] if not isinstance(numbers.get(key), int | float)]:
        raise ValueError(f"config.json: rope_type={kind!r} needs the numbers {', '.join(absent)}; it says {dict(rope)}.")
    return theta, {"rope_type": kind, **{key: numbers[key] for key in ROPE_KEYS[kind]}}


def read_llama(raw: Raw) -> DecoderConfig:
    if _size(raw, "hidden_size") % _size(raw, "num_attention_heads"):
        raise ValueError(
            f"config.json: a llama's hidden_size={raw['hidden_size']} is a multiple of its {raw['num_attention_heads']} heads."
        )
    bias = bool(_value(raw, "attention_bias", False))
    mlp_bias = bool(_value(raw, "mlp_bias", False))
    return _common(raw, head_dim=None, kv_heads=None, attention_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias)


def read_mistral(raw: Raw) -> DecoderConfig:
    refuse(raw, "layer_types", (None,), "Mistral's layers are all alike")
    window = raw.get("sliding_window", 4096)  # an explicit null means none
    return _common(raw, head_dim=None, kv_heads=8, window=window)


def read_qwen2(raw: Raw) -> DecoderConfig:
    return _common(raw, head_dim=None, kv_heads=32, window=_qwen_window(raw), attention_bias=True)


def read_qwen3(raw: Raw) -> DecoderConfig:
    bias = bool(_value(raw, "attention_bias", False))
    features = dict(attention_bias=bias, attention_out_bias=bias, qk_norm=True)
    return _common(raw, head_dim=128, kv_heads=32, window=_qwen_window(raw), **features)


def _qwen_window(raw: Raw) -> int | None:
    """The window of all layers. ValueError if some layers have one and others do not."""
    layers = _size(raw, "num_hidden_layers")
    size = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first = _value(raw, "max_window_layers", 28)
    by_layer = ["sliding_attention" if size is not None and i >= first else "full_attention" for i in range(layers)]
    kinds = raw.get("layer_types") or by_layer
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"} or ("sliding_attention" in kinds and size is None):
        raise ValueError(f"config.json: layer_types={kinds} do not fit num_hidden_layers={layers} and sliding_window={size}.")
    if len(set(kinds)) > 1:
        raise ValueError(
            f"config.json: {kinds.count('sliding_attention')} of {layers} layers have a sliding window and the others none "
            f"(max_window_layers={first}); windows that differ between layers are not supported yet."
        )
    return size if kinds[0] == "sliding_attention" else None


def _write_common(config: DecoderConfig) -> dict[str, Any]:
    # Readers of either layout must find the rotary numbers: one that does not would take its default in silence.
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
    }


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_common(config), "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_common(config), "sliding_window": config.window}


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    sliding = config.window is not None
    kinds = ["sliding_attention" if sliding else "full_attention"] * config.layers
    window = dict(use_sliding_window=sliding, sliding_window=config.window, max_window_layers=0 if sliding else config.layers)
    return {**_write_common(config), **window, "layer_types": kinds}


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**write_qwen2(config), "attention_bias": config.attention_bias}


def refuse(raw: Raw, key: str, neutral: tuple, why: str) -> None:
    """ValueError if a key has any value but the neutral ones (or is absent)."""
    if key in raw and raw[key] not in neutral:
        raise ValueError(f"config.json: {key}={raw[key]!r} is not supported: {why}.")


def _value(raw: Raw, key: str, default: Any) -> Any:
    """The key's value; the default where it is absent or null."""
    value = raw.get(key)
    return default if value is None else value


def _size(raw: Raw, key: str) -> int:
    value = raw.get(key)
    if type(value) is not int:
        raise ValueError(f"config.json: {key}={value!r} must be a whole number.")
    return value
