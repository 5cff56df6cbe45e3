"""Gemma 1, Gemma 2 and the text models of Gemma 3."""

from __future__ import annotations

import functools
from typing import Any

from tuning.hub import llama
from tuning.hub.family import Family, Raw, activation, activation_name, decoder_forms, refuse, rope, size, value, windows, write_rope
from tuning.models.heads import HeadConfig
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

AROUND = {
    **llama.NORMS, "attn_out_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}  # fmt: skip
ACTIVATION = "gelu_pytorch_tanh"


def read(raw: Raw, **features: Any) -> TransformerConfig:
    """What all Gemmas have in common."""
    refuse(raw, "use_bidirectional_attention", (None, False), "here a token sees only itself and those before it")
    bias, scale = bool(value(raw, "attention_bias", False)), size(raw, "hidden_size") ** 0.5
    common = dict(norm="rms_plus_one", embed_scale=scale, attention_bias=bias, attention_out_bias=bias)
    return llama.read(raw, act=ACTIVATION, head_dim=256, tied=True, **common, **features)


def read_gemma(raw: Raw) -> TransformerConfig:
    said = activation(raw, default=ACTIVATION)
    act = "gelu_tanh" if said == "gelu" else said  # the first files say "gelu" and mean its approximation
    if raw.get("hidden_activation") is not None and activation(raw, "hidden_activation") != act:
        raise ValueError(
            f"config.json: hidden_act={raw.get('hidden_act')!r} and hidden_activation={raw['hidden_activation']!r} differ, and versions of "
            "transformers go by one or the other. Set both to the one that is meant."
        )
    return read(raw, kv_heads=16, activation=act)


def read_later(raw: Raw, *, period: int, local: str, **features: Any) -> TransformerConfig:
    """What Gemma 2 and 3 have in common: layers have a window, and `local` for their rotation, but for the last of each period."""
    if size(raw, "hidden_size") % size(raw, "num_attention_heads"):
        raise ValueError(f"config.json: hidden_size={raw['hidden_size']} must be a multiple of its {raw['num_attention_heads']} heads.")
    default = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(size(raw, "num_hidden_layers"))]
    kinds = tuple(Kind() if w is None else Kind(w, local) for w in windows(raw, default, raw.get("sliding_window", 4096)))
    scalar = size(raw, "query_pre_attn_scalar", 256)
    scale = 0.0 if scalar == value(raw, "head_dim", 256) else scalar**-0.5
    act = activation(raw, "hidden_activation", ACTIVATION)
    return read(raw, kv_heads=4, kinds=kinds, order="around", scale=scale, activation=act, **features)


def read_gemma2(raw: Raw) -> TransformerConfig:
    return read_later(raw, period=2, local="global", softcap=cap(raw, "attn_logit_softcapping", 50.0))


def read_gemma3(raw: Raw) -> TransformerConfig:
    refuse(raw, "attn_logit_softcapping", (None,), "a Gemma 3 does not cap the scores of attention")
    both = raw.get("rope_parameters") or {}
    if set(both) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: rope_parameters={both} must have the keys full_attention and sliding_attention.")
    far = {**(both.get("full_attention") or {}), **(raw.get("rope_scaling") or {})}
    one = {**raw, "rope_scaling": None, "rope_parameters": far}
    near = rope({**one, "rope_parameters": both.get("sliding_attention"), "rope_theta": raw.get("rope_local_base_freq")})
    if near[1:] != (None, 1.0):
        raise ValueError(f"config.json: rope_parameters={both} for sliding_attention may only have a rope_theta.")
    period = size(raw, "sliding_window_pattern", 6)
    return read_later(one, period=period, local="local", theta=1e6, local_theta=near.theta, qk_norm="head")


def cap(raw: Raw, key: str, default: float | None) -> float:
    """A soft cap; an explicit null means none."""
    return float(raw.get(key, default) or 0.0)


def write(c: TransformerConfig) -> dict[str, Any]:
    return {**llama.write(c), "hidden_activation": activation_name(c.activation), "attention_bias": c.attention_bias}


def write_later(c: TransformerConfig) -> dict[str, Any]:
    return {
        **write(c),
        "layer_types": ["full_attention" if kind.window is None else "sliding_attention" for kind in c.kinds],
        "sliding_window": max((kind.window for kind in c.kinds if kind.window), default=4096),
        "query_pre_attn_scalar": round(c.scale**-2) if c.scale else c.head_dim,
        "attn_logit_softcapping": c.softcap or None,
        "final_logit_softcapping": c.head.softcap or None,
    }


def write_gemma3(c: TransformerConfig) -> dict[str, Any]:
    both = {"full_attention": write_rope(c.rope_theta, c.rope_scaling), "sliding_attention": write_rope(c.local_theta, None)}
    return {**write_later(c), "rope_local_base_freq": c.local_theta, "rope_parameters": both}


def capped(default: float | None, raw: Raw) -> HeadConfig:
    """The language model's head, whose logits may have a soft cap."""
    return HeadConfig(softcap=cap(raw, "final_logit_softcapping", default))


two, three = decoder_forms("Gemma2"), decoder_forms("Gemma3Text")
FORMS_2 = {**two, "Gemma2ForCausalLM": two["Gemma2ForCausalLM"]._replace(head=functools.partial(capped, 30.0))}
FORMS_3 = {
    "Gemma3ForCausalLM": three["Gemma3TextForCausalLM"]._replace(head=functools.partial(capped, None)),
    **{name: three[name] for name in ("Gemma3TextForSequenceClassification", "Gemma3TextModel")},
}
# How files of a Gemma 3 that also reads images name the text model's tensors, and what else they hold.
OUTER = ("language_model.model.", "model.language_model.", "language_model.")
IMAGES = r"(^|\.)rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\."
FAMILIES = {
    "gemma": Family(decoder_forms("Gemma"), read_gemma, write, llama.table()),
    "gemma2": Family(FORMS_2, read_gemma2, write_later, llama.table(norms=AROUND)),
    "gemma3_text": Family(FORMS_3, read_gemma3, write_gemma3, llama.table(norms=AROUND), within=OUTER, ignored=IMAGES),
}


# What a multimodal file leaves out of its text_config where it is as in transformers' class.
TEXT = dict(
    vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, max_position_embeddings=131_072,
)  # fmt: skip


def text_of(raw: Raw) -> dict[str, Any]:
    """The config.json of the text model inside a Gemma 3 that also reads images."""
    outer = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype") if key in raw}
    named = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return {**TEXT, **outer, **(raw.get("text_config") or {}), **named}


INSIDE = {"gemma3": text_of}
