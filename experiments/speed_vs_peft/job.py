"""What both sides are asked to do: the shape of the model, the batches, the optimizer's numbers. Neither jax nor torch is imported here.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

# Keys of transformers' LlamaConfig. 1b and 8b are those of Llama 3.2 1B and Llama 3.1 8B.
COMMON = dict(max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=None)
SHAPES = {
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
        vocab_size=256, tie_word_embeddings=True,
    ),
    "22m": dict(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=1408,
        vocab_size=8192, tie_word_embeddings=True,
    ),
    "60m": dict(
        hidden_size=640, num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=5, head_dim=64, intermediate_size=1792,
        vocab_size=16384, tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, intermediate_size=8192,
        vocab_size=128256, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
    "8b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=500000.0),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One tuning job.

    shape    a key of SHAPES
    method   "lora" (all projections) or "full"
    dtype    "float32", or "bfloat16": computation and frozen weights in it, what learns in float32
    rows     sequences of a batch, each `length` tokens
    threads  CPU cores that a side may use
    remat    whether the backward pass recomputes each layer
    """

    shape: str
    method: str
    dtype: str
    rows: int
    length: int
    threads: int
    remat: bool
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    @property
    def vocab_size(self) -> int:
        return SHAPES[self.shape]["vocab_size"]


def batch(job: Job, step: int) -> dict[str, np.ndarray]:
    """The packed batch of a step, arrays [B, T] as in tuning.core.types.Batch: random tokens in examples of 20 to 200, little padding.

    The speed does not depend on what the tokens are.
    """
    rng = np.random.default_rng((7, step))
    tokens = rng.integers(3, job.vocab_size, (job.rows, job.length)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(job.rows):
        start, number = 0, 0
        while (size := int(rng.integers(20, 200))) <= job.length - start or number == 0:
            size, number = min(size, job.length), number + 1
            segments[row, start : start + size], positions[row, start : start + size] = number, np.arange(size)
            start += size
    targets = np.roll(tokens, -1, axis=1)
    follows = (segments != 0) & (np.roll(segments, -1, axis=1) == segments)
    follows[:, -1] = False
    return dict(tokens=tokens, targets=targets, weights=follows.astype(np.float32), segments=segments, positions=positions)


def tokens(one: dict[str, np.ndarray]) -> int:
    """Tokens of a batch, padding not counted."""
    return int((one["segments"] != 0).sum())


def write_weights(shape: str, dtype: str, directory: Path) -> None:
    """A checkpoint with random weights, as transformers writes it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON, **SHAPES[shape]), dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
