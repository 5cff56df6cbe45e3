"""Tiny published checkpoints for tests: written by transformers with random weights, read back by transformers as the reference."""

from __future__ import annotations

import json
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
YARN_ROPE = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16)
T5 = dict(
    model_type="t5", auto="Seq2SeqLM", alone=True, vocab_size=100, d_model=32, d_kv=12, d_ff=48, num_layers=3, num_decoder_layers=2,
    num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0,
)  # fmt: skip
# One entry for each variation of a family: `model_type`, `auto` (the AutoModelFor... that makes it; CausalLM if not said), and what its
# configuration has besides COMMON (`alone`: instead of COMMON; `untied`: the head gets its own weights, whatever is said).
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": dict(model_type="llama"),
    "llama3": dict(model_type="llama", rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_bias": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "llama_linear": dict(model_type="llama", rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0)),
    "llama_dynamic": dict(
        model_type="llama", max_position_embeddings=20, rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=3.0)
    ),
    "llama_yarn": dict(model_type="llama", rope_parameters=YARN_ROPE),
    "llama_classes": dict(model_type="llama", auto="SequenceClassification", num_labels=3),
    "llama_tags": dict(model_type="llama", auto="TokenClassification", num_labels=5),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2"),
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0, tie_word_embeddings=True),
    "qwen2_mixed": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "mixtral": dict(model_type="mixtral", sliding_window=5, num_local_experts=6),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_hidden_layers=4, head_dim=8, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24,
        mlp_only_layers=[0, 2], norm_topk_prob=True
    ),
    "gpt2": dict(model_type="gpt2"),
    "gpt2_classes": dict(model_type="gpt2", num_hidden_layers=2, n_inner=48, auto="SequenceClassification", num_labels=3),
    "gpt2_body": dict(model_type="gpt2", num_hidden_layers=2, activation_function="relu", auto=""),
    "neox": dict(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=500),
    "neox_answers": dict(
        model_type="gpt_neox", num_hidden_layers=2, use_parallel_residual=False, attention_bias=False, auto="QuestionAnswering",
        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0, partial_rotary_factor=1.0)
    ),
    "falcon": dict(model_type="falcon"),
    "falcon_new": dict(model_type="falcon", new_decoder_architecture=True, num_kv_heads=2, rope_parameters=YARN_ROPE),
    "falcon_one_norm": dict(
        model_type="falcon", num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
        tie_word_embeddings=False
    ),
    "falcon_alibi": dict(
        model_type="falcon", hidden_size=48, num_attention_heads=12, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "bloom": dict(model_type="bloom", hidden_size=48, num_attention_heads=6),
    "bloom_tags": dict(model_type="bloom", num_hidden_layers=2, auto="TokenClassification", num_labels=5),
    "t5": T5,
    "t5_gated": {**T5, "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False, "untied": True},
    "t5_body": {**T5, "auto": ""},
    "mt5": {**T5, "model_type": "mt5", "num_decoder_layers": 4, "untied": True},
    "gemma": dict(model_type="gemma", head_dim=16, hidden_act="gelu", attention_bias=True),
    "gemma2": dict(
        model_type="gemma2", num_hidden_layers=5, head_dim=16, query_pre_attn_scalar=64, attn_logit_softcapping=2.0,
        final_logit_softcapping=9.0, sliding_window=5
    ),
    "gemma3": dict(
        model_type="gemma3_text", num_hidden_layers=7, head_dim=8, query_pre_attn_scalar=100, sliding_window=5, sliding_window_pattern=3,
        rope_theta=500.0, rope_local_base_freq=20.0, rope_scaling=dict(rope_type="linear", factor=3.0), final_logit_softcapping=9.0
    ),
    "gemma3_body": dict(model_type="gemma3_text", num_hidden_layers=2, head_dim=8, sliding_window_pattern=1, auto=""),
    "gemma3_classes": dict(
        model_type="gemma3_text", num_hidden_layers=2, head_dim=8, sliding_window_pattern=1, auto="SequenceClassification", num_labels=3
    ),
    "olmo2": dict(model_type="olmo2", attention_bias=True),
    "smollm3": dict(
        model_type="smollm3", num_hidden_layers=5, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5,
        attention_bias=True, mlp_bias=True
    ),
    "phi3": dict(model_type="phi3", sliding_window=5),
    "phi3_long": dict(
        model_type="phi3", tie_word_embeddings=True, original_max_position_embeddings=34, partial_rotary_factor=0.75,
        rope_parameters=dict(rope_type="longrope", rope_theta=500.0, short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 4.0, 8.0])
    ),
    "bert_masked": dict(model_type="bert", auto="MaskedLM", layer_norm_eps=1e-3, hidden_act="gelu_new"),
    "bert_classes": dict(model_type="bert", auto="SequenceClassification", num_labels=3),
    "bert_tags": dict(model_type="bert", auto="TokenClassification", num_labels=5),
    "bert_spans": dict(model_type="bert", auto="QuestionAnswering"),
    "bert_pooled": dict(model_type="bert", auto=""),
    "roberta_masked": dict(model_type="roberta", auto="MaskedLM", pad_token_id=1, type_vocab_size=1, hidden_act="relu"),
    "roberta_classes": dict(model_type="roberta", auto="SequenceClassification", pad_token_id=1, type_vocab_size=1, num_labels=3),
    "xlm_roberta": dict(model_type="xlm-roberta", auto="", pad_token_id=1, type_vocab_size=1),
    "distilbert_masked": dict(model_type="distilbert", auto="MaskedLM", dim=32, n_layers=3, n_heads=4, hidden_dim=48, activation="relu"),
    "distilbert_classes": dict(
        model_type="distilbert", auto="SequenceClassification", dim=32, n_layers=3, n_heads=4, hidden_dim=48, num_labels=3
    ),
    "modernbert_masked": dict(
        model_type="modernbert", auto="MaskedLM", num_hidden_layers=5, local_attention=10, norm_eps=1e-3, attention_bias=True,
        mlp_bias=True, norm_bias=True
    ),
    "modernbert_classes": dict(
        model_type="modernbert", auto="SequenceClassification", num_labels=3, local_attention=10, classifier_bias=True,
        classifier_activation="silu", classifier_pooling="mean", layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "modernbert_spans": dict(
        model_type="modernbert", auto="QuestionAnswering", local_attention=10, hidden_activation="relu", rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=3.0, rope_theta=500.0), sliding_attention=dict(rope_type="default",
        rope_theta=70.0), )
    ),
}
# fmt: on


# Entries whose layers are those of another one of their family, but for numbers.
ALIKE = (
    "llama3", "llama_linear", "llama_yarn", "qwen2_window", "falcon_one_norm", "t5_gated", "gemma3_body", "bert_pooled", "gpt2_body",
    "t5_body",
)  # fmt: skip


def bodies() -> list[str]:
    """The entries that differ in more than their head."""
    speaks = ("CausalLM", "MaskedLM", "Seq2SeqLM", "")
    return [name for name, said in FAMILIES.items() if said.get("auto", "CausalLM") in speaks and name not in ALIKE]


def tiny(family: str, directory: Path, *, max_shard_size: str | int = "20KB", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random checkpoint of a family (a key of FAMILIES) in several shards; overrides change its transformers configuration."""
    import torch
    from transformers import AutoConfig

    settings = {**FAMILIES[family], **overrides}
    kind, auto, alone = settings.pop("model_type"), settings.pop("auto", "CausalLM"), settings.pop("alone", False)
    untied = settings.pop("untied", False)
    config = AutoConfig.for_model(kind, **({} if alone else COMMON) | settings)
    torch.manual_seed(seed)
    model = _auto(auto).from_config(config)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # transformers starts biases at 0 and scales at 1, where a mistake would not show
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * torch.randn(parameter.shape))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def _auto(name: str) -> Any:
    """transformers' AutoModelFor..., or AutoModel for ""."""
    import transformers

    return getattr(transformers, f"AutoModelFor{name}" if name else "AutoModel")


def reference(directory: Path, auto: str = "CausalLM") -> Any:
    """The transformers model of a directory, float32, ready to be compared with."""
    import torch

    # Falcon's eager attention adds ALiBi twice; the one that is used unless something else is asked for adds it once.
    way = "sdpa" if json.loads((directory / "config.json").read_text()).get("alibi") else "eager"
    model, report = _auto(auto).from_pretrained(directory, dtype=torch.float32, attn_implementation=way, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tokens(rows: int = 3, length: int = 40, vocab: int = 100) -> np.ndarray:
    """Random token ids [rows, length]."""
    return np.random.default_rng(7).integers(3, vocab, (rows, length))
