"""Random runs for a pod: a family, sizes, a method, a mesh, a slice. The same number gives the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v5p:2x2x2", "v6e:2x2", "v6e:2x4")
DEVICES = {"v5e:2x4": 8, "v5e:4x4": 16, "v5p:2x2x1": 4, "v5p:2x2x2": 8, "v6e:2x2": 4, "v6e:2x4": 8}
FAMILIES = ("llama", "llama", "llama", "qwen3", "mistral", "olmo2", "gemma2", "gpt2", "mixtral", "qwen3_moe", "bert", "t5")


def draw(number: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """(topology, config); the model's config.json is written to a folder of its own."""
    rng = np.random.default_rng(number)
    pick = lambda *options: options[int(rng.integers(len(options)))]  # noqa: E731
    family, topology = pick(*FAMILIES), pick(*TOPOLOGIES)
    shape = published(family, pick)
    path = folder / f"model-{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    tensor = pick(1, 1, 1, 2, 4)
    split = pick("fsdp", "fsdp", "data") if family != "bert" else "data"
    mesh = {"data": -1, "fsdp": 1, "tensor": tensor} if split == "data" else {"data": 1, "fsdp": -1, "tensor": tensor}
    rows, accumulate = pick(1, 1, 2, 4), pick(1, 1, 1, 2, 4)
    length = 512 if family in ("bert", "t5") else 1024 if family == "gpt2" else pick(1024, 2048, 4096, 8192)
    model: dict[str, Any] = {"path": str(path), "dtype": "bfloat16", "remat": pick("full", "full", "dots", "none")}
    method: dict[str, Any] = pick(*[{"name": "lora", "rank": 16}] * 3, {"name": "full"}, {"name": "full"}, {"name": "ia3"})
    if method["name"] == "lora" and pick(True, False, False):
        model["quantise"] = pick("nf4", "int8")
    config = {
        "model": model, "method": method, "mesh": mesh, "data": {"train": {"length": length}},
        "optimizer": {"name": pick("adamw", "adamw", "adamw", "adafactor", "lion")},
        "train": {"batch_size": rows * accumulate * DEVICES[topology] // tensor, "accumulate": accumulate},
    }  # fmt: skip
    if family == "bert":
        model |= {"head": "sequence_classification", "classes": ("a", "b", "c")}
        config["objective"] = {"name": "labels"}
    return topology, config


def published(family: str, pick: Any) -> dict[str, Any]:
    """A config.json of a family, of a size that is not published."""
    width, layers = pick(1024, 1536, 2048, 3072, 4096), pick(12, 16, 24, 32)
    heads = width // 128
    common = dict(vocab_size=pick(32_000, 50_304, 128_256), hidden_size=width, num_hidden_layers=layers, max_position_embeddings=8192)
    grouped = dict(num_attention_heads=heads, num_key_value_heads=max(heads // 4, 4), head_dim=128, intermediate_size=pick(3, 4) * width)
    like_llama = {**common, **grouped, "tie_word_embeddings": pick(True, False)}
    if family == "gpt2":
        return {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": width, "n_layer": layers, "n_head": width // 64, "n_positions": 1024,
                "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
    if family == "bert":
        return {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30_522, "hidden_size": width,
                "num_hidden_layers": layers, "num_attention_heads": width // 64, "intermediate_size": 4 * width,
                "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    if family == "t5":
        return {"model_type": "t5", "vocab_size": 32_128, "d_model": width, "num_layers": layers, "num_heads": width // 64, "d_kv": 64,
                "d_ff": 4 * width, "dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": pick("relu", "gated-gelu"),
                "tie_word_embeddings": pick(True, False)}  # fmt: skip
    if family == "mixtral":
        return {"model_type": "mixtral", **like_llama, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    if family == "qwen3_moe":
        return {"model_type": "qwen3_moe", **like_llama, "num_experts": pick(16, 32, 64), "num_experts_per_tok": pick(2, 4),
                "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    if family == "gemma2":
        return {"model_type": "gemma2", **like_llama, "tie_word_embeddings": True, "sliding_window": 2048, "query_pre_attn_scalar": 128,
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
    return {"model_type": family, **like_llama, **({"sliding_window": pick(None, 2048)} if family == "mistral" else {})}
