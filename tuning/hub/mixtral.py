"""Mixtral and Qwen3-MoE: decoders whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from typing import Any

from tuning.hub import llama
from tuning.hub.family import Family, Raw, decoder_forms, refuse, size, value
from tuning.hub.names import Row, Table
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind


def _table(router: str, gate: str, up: str, down: str) -> Table:
    """Llama's, and the router and the experts' kernels: one tensor for each expert."""
    layer = "model.layers.{layer}."
    experts = {"mlp/gate/kernel": gate, "mlp/up/kernel": up, "mlp/down/kernel": down}
    routed = [Row(leaf, f"{layer}{tensor}.weight", transposed=True) for leaf, tensor in {"mlp/router/kernel": router, **experts}.items()]
    return (*routed, *llama.table())


def _experts(raw: Raw, count: int, per_token: int) -> dict[str, Any]:
    """The numbers of experts under either name; the others are the family's defaults."""
    said = "num_local_experts" if raw.get("num_local_experts") is not None else "num_experts"
    return dict(experts=size(raw, said, count), per_token=size(raw, "num_experts_per_tok", per_token))


def read_mixtral(raw: Raw) -> TransformerConfig:
    refuse(raw, "router_jitter_noise", (0, None), "the router's input is not made noisy")
    kinds = (Kind(window=raw.get("sliding_window"), routed=True),) * size(raw, "num_hidden_layers")
    hidden, counts = size(raw, "intermediate_size"), _experts(raw, 8, 2)
    return llama.read(raw, kv_heads=8, theta=1e6, eps=1e-5, kinds=kinds, expert_hidden=hidden, **counts)


def read_qwen3(raw: Raw) -> TransformerConfig:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    dense, step = value(raw, "mlp_only_layers", []), value(raw, "decoder_sparse_step", 1)
    routed = [i not in dense and (i + 1) % step == 0 for i in range(size(raw, "num_hidden_layers"))]
    bias = bool(value(raw, "attention_bias", False))
    return llama.read(
        raw, kv_heads=4, kinds=tuple(Kind(window=window, routed=r) for r in routed), qk_norm="head", attention_bias=bias,
        attention_out_bias=bias, expert_hidden=size(raw, "moe_intermediate_size", 768),
        normalize_experts=bool(value(raw, "norm_topk_prob", False)), **_experts(raw, 128, 8),
    )  # fmt: skip


def write_mixtral(c: TransformerConfig) -> dict[str, Any]:
    shared = {**llama.write_mistral(c), "num_local_experts": c.experts, "num_experts_per_tok": c.per_token}
    return {**shared, "intermediate_size": c.expert_hidden, "router_jitter_noise": 0.0}


def write_qwen3(c: TransformerConfig) -> dict[str, Any]:
    window = c.kinds[0].window
    return {
        **llama.write(c), "num_experts": c.experts, "num_local_experts": c.experts, "num_experts_per_tok": c.per_token,
        "moe_intermediate_size": c.expert_hidden,
        "norm_topk_prob": c.normalize_experts, "decoder_sparse_step": 1, "attention_bias": c.attention_bias,
        "mlp_only_layers": [i for i, kind in enumerate(c.kinds) if not kind.routed],
        "use_sliding_window": window is not None, "sliding_window": window,
    }  # fmt: skip


MIXTRAL = [f"block_sparse_moe.{name}" for name in ("gate", "experts.{expert}.w1", "experts.{expert}.w3", "experts.{expert}.w2")]
QWEN3 = [f"mlp.{name}" for name in ("gate", "experts.{expert}.gate_proj", "experts.{expert}.up_proj", "experts.{expert}.down_proj")]
FAMILIES = {
    "mixtral": Family(decoder_forms("Mixtral"), read_mixtral, write_mixtral, _table(*MIXTRAL)),
    "qwen3_moe": Family(decoder_forms("Qwen3Moe"), read_qwen3, write_qwen3, _table(*QWEN3)),
}
