"""Tiny published checkpoints for tests: written by transformers with random weights, read back by transformers as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

COMMON = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": dict(model_type="llama"),
    "llama3": dict(model_type="llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_bias": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2"),
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


def tiny(family: str, directory: Path, *, max_shard_size: str | int = "20KB", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random checkpoint of a family (a key of FAMILIES) in several shards; overrides change its transformers configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # transformers starts biases at 0 and scales at 1, where a mistake would not show
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * torch.randn(parameter.shape))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def reference(directory: Path) -> Any:
    """The transformers model of a directory, float32, ready to be compared with."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tokens(rows: int = 3, length: int = 40, vocab: int = 100) -> np.ndarray:
    """Random token ids [rows, length]."""
    return np.random.default_rng(7).integers(3, vocab, (rows, length))
