"""Sentence encoders: how a sentence-transformers directory makes one vector of a text.

Shapes: B texts, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tuning.hub import files

# How the hidden states of a text become one vector: what older directories say of each, and what newer ones call it. Several stand
# behind one another in this order.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
CHAINS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
# The file about the network, by the names that older directories had for it.
LIMITS = [f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
# What else it may say: that the vectors come from the last hidden states of a text.
PLAIN = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}


@dataclasses.dataclass(frozen=True)
class Sentences:
    """How a text becomes a vector. White space around it is removed first.

    pooling     of the last hidden states, values of POOLINGS
    normalize   whether the vector is made one of length 1
    max_tokens  a text is cut to so many, its special tokens counted; None for as many as network and tokenizer take
    lower       whether a text is written in small letters first
    """

    pooling: tuple[str, ...]
    normalize: bool
    max_tokens: int | None = None
    lower: bool = False


def read(directory: Path) -> Sentences | None:
    """What modules.json and the files that it names say; None where there is none. ValueError for what is not supported."""
    if not (directory / "modules.json").is_file():
        return None
    kinds, paths = _modules(directory / "modules.json")
    said = _json(directory / "config_sentence_transformers.json")
    if (prompt := said.get("default_prompt_name")) is not None:
        raise ValueError(
            f"{directory}: default_prompt_name={prompt!r} is not supported. Set it to null, and write the prompt before texts."
        )
    name = next((name for name in LIMITS if (directory / name).is_file()), LIMITS[0])
    limits = _json(directory / name)
    wrong = {k: v for k, v in limits.items() if k not in ("max_seq_length", "do_lower_case") and PLAIN.get(k) != v}
    if wrong:
        raise ValueError(f"{directory / name}: {wrong} is not supported; known are max_seq_length, do_lower_case and {PLAIN}.")
    pooling = _pooling(directory / paths[1] / "config.json")
    return Sentences(pooling, "Normalize" in kinds, limits.get("max_seq_length"), bool(limits.get("do_lower_case")))


def copy(source: Path, target: Path) -> None:
    """The files that make a sentence encoder of a checkpoint, where the source has them."""
    if read(source) is None:
        return
    _, paths = _modules(source / "modules.json")
    for name in ("modules.json", "config_sentence_transformers.json", *LIMITS, *(f"{folder}/config.json" for folder in paths[1:])):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    for folder in paths[1:]:
        (target / folder).mkdir(exist_ok=True)


def _json(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is none."""
    return files.read_json(path) if path.is_file() else {}


def _modules(path: Path) -> tuple[list[str], list[str]]:
    """(what each module is, its folder)."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds, paths = [m["type"].rsplit(".", 1)[-1] for m in modules], [m.get("path", "") for m in modules]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no list of modules with `type` and `path`: {error!r}.") from None
    if kinds not in CHAINS or paths[0] or any(not re.fullmatch(r"[\w-]+", folder) for folder in paths[1:]):
        raise ValueError(
            f"{path}: {' -> '.join(kinds)} is not supported; known are {' and '.join(map(' -> '.join, CHAINS))}, the first in ''."
        )
    return kinds, paths


def _pooling(path: Path) -> tuple[str, ...]:
    said = _json(path)
    mode = said.get("pooling_mode")
    # include_prompt is about prompts that the caller hands over apart from the texts.
    unknown = set(said) - {*POOLINGS, "pooling_mode", "word_embedding_dimension", "embedding_dimension", "include_prompt"}
    chosen = (mode,) if mode is not None else tuple(ours for key, ours in POOLINGS.items() if said.get(key, ours == "mean"))
    if not said or unknown or not chosen or not all(one in POOLINGS.values() for one in chosen):
        raise ValueError(f"{path} says {dict(said)}; what is supported is a pooling of {', '.join(POOLINGS.values())}.")
    return chosen


def pool(hidden_BTD: jax.Array, mask_BT: jax.Array, how: Sentences) -> jax.Array:
    """The vectors of texts from their last hidden states, [B, D] float32 (D for each of the poolings).

    mask_BT  1 on tokens, 0 on padding, which may stand on either side; every text has a token
    """
    x_BTD, real_BT = hidden_BTD.astype(jnp.float32), (mask_BT != 0).astype(jnp.float32)
    count_B1, place_BT = real_BT.sum(1, keepdims=True), real_BT.cumsum(1) * real_BT
    weights = {
        "cls": lambda: place_BT == 1,
        "mean": lambda: real_BT / count_B1,
        "mean_sqrt_len_tokens": lambda: real_BT / jnp.sqrt(count_B1),
        "weightedmean": lambda: place_BT / place_BT.sum(1, keepdims=True),
        "lasttoken": lambda: place_BT == count_B1,
    }

    def one(name: str) -> jax.Array:
        if name == "max":
            return jnp.where(real_BT[..., None] > 0, x_BTD, -jnp.inf).max(1)
        return jnp.einsum("btd,bt->bd", x_BTD, weights[name]().astype(jnp.float32), precision="highest")

    y_BD = jnp.concatenate([one(name) for name in how.pooling], axis=1)
    return y_BD / jnp.maximum(jnp.linalg.norm(y_BD, axis=1, keepdims=True), 1e-12) if how.normalize else y_BD
