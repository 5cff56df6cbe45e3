"""The config.json of models that are planned for before their files are there: those that are gated, and machines without a network.

As published under these ids, but only the keys that the families read: architecture, no token ids, no dtype. The number of parameters
that each gives is compared with the published one in tests/hub/test_hub_known.py.
"""

from __future__ import annotations

from typing import Any

from tuning.hub import families
from tuning.hub.family import Raw


def _llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    """The sizes of a Llama-like decoder."""
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": hidden, **more,
    }  # fmt: skip


def _rope3(factor: float) -> dict[str, Any]:
    """The rotary scaling of Llama 3.1 to 3.3."""
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
LLAMA2 = {**LLAMA, "vocab_size": 32_000, "max_position_embeddings": 4096}
LLAMA3 = {**LLAMA, "vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rope_scaling": _rope3(8.0)}
SMALL3 = {**LLAMA3, "rope_scaling": _rope3(32.0), "tie_word_embeddings": True}
LLAMA3_70B = {**LLAMA3, **_llama(80, 8192, 64, 8, 28_672)}
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064, "max_position_embeddings": 131_072,
    "rope_theta": 1e6, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128,
    "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5}
MISTRAL_7B = {**MISTRAL, **_llama(32, 4096, 32, 8, 14_336)}
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32_128, "d_kv": 64, "num_layers": 24,
    "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}  # fmt: skip
ENCODER = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip

KNOWN: dict[str, Raw] = {
    "meta-llama/Llama-2-7b-hf": {**LLAMA2, **_llama(32, 4096, 32, 32, 11_008)},
    "meta-llama/Llama-2-13b-hf": {**LLAMA2, **_llama(40, 5120, 40, 40, 13_824)},
    "meta-llama/Llama-2-70b-hf": {**LLAMA2, **_llama(80, 8192, 64, 8, 28_672)},
    "meta-llama/Llama-3.1-8B": {**LLAMA3, **_llama(32, 4096, 32, 8, 14_336)},
    "meta-llama/Llama-3.1-70B": LLAMA3_70B,
    "meta-llama/Llama-3.1-405B": {**LLAMA3, **_llama(126, 16_384, 128, 8, 53_248)},
    "meta-llama/Llama-3.2-1B": {**SMALL3, **_llama(16, 2048, 32, 8, 8192, head_dim=64)},
    "meta-llama/Llama-3.2-3B": {**SMALL3, **_llama(28, 3072, 24, 8, 8192, head_dim=128)},
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA3_70B,
    "HuggingFaceTB/SmolLM2-135M": {
        **LLAMA, **_llama(30, 576, 9, 3, 1536), "vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B": {**QWEN2, **_llama(28, 3584, 28, 4, 18_944, rms_norm_eps=1e-6)},
    "Qwen/Qwen2.5-32B": {**QWEN2, **_llama(64, 5120, 40, 8, 27_648, rms_norm_eps=1e-5)},
    "Qwen/Qwen3-8B": {**QWEN3, **_llama(36, 4096, 32, 8, 12_288), "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "Qwen/Qwen3-30B-A3B": {
        **QWEN3, **_llama(48, 2048, 32, 4, 6144), "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "google/gemma-2-9b": {
        **_llama(42, 3584, 16, 8, 14_336, head_dim=256), "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256_000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "google/gemma-3-27b-pt": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            **_llama(62, 5376, 32, 16, 21_504, head_dim=128), "model_type": "gemma3_text", "query_pre_attn_scalar": 168,
            "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "mistralai/Mistral-7B-v0.1": {**MISTRAL_7B, "vocab_size": 32_000, "rope_theta": 10_000.0, "sliding_window": 4096},
    "mistralai/Mistral-7B-v0.3": {**MISTRAL_7B, "vocab_size": 32_768, "rope_theta": 1e6, "sliding_window": None},
    "mistralai/Mixtral-8x7B-v0.1": {
        **MISTRAL_7B, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32_000, "rope_theta": 1e6,
        "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "microsoft/phi-4": {
        **_llama(40, 5120, 40, 10, 17_920), "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 100_352,
        "max_position_embeddings": 16_384, "original_max_position_embeddings": 16_384, "rms_norm_eps": 1e-5, "rope_theta": 250_000.0,
        "sliding_window": None,
    },
    "allenai/OLMo-2-1124-7B": {
        **_llama(32, 4096, 32, 32, 11_008), "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100_352,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50_257, "n_layer": 12, "n_embd": 768, "n_head": 12,
        "n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    },
    "google-bert/bert-base-uncased": {
        **ENCODER, "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30_522, "max_position_embeddings": 512,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    },
    "FacebookAI/roberta-base": {
        **ENCODER, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 50_265, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    },
    "google-t5/t5-large": {**T5, "d_model": 1024, "d_ff": 4096, "num_heads": 16},
    "google/flan-t5-xl": {
        **T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
}  # fmt: skip


def config(path: str) -> Raw | None:
    """The config.json of a hub id, or of the text model inside if it reads more than text; None if the id is not known here."""
    raw = KNOWN.get(path)
    return families.INSIDE.get(raw["model_type"], dict)(raw) if raw else None
