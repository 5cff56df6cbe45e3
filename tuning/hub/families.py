"""The published families: for each model_type, its config mapping and its table of names."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tuning.core import parts
from tuning.hub import llama
from tuning.hub.names import Table
from tuning.models.decoder import DecoderConfig

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """One model_type.

    architecture  the class that transformers loads it with
    read, write   config.json -> DecoderConfig, and back
    table         where the tensors go
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    table: Table


# In the order in which a network that was not read from a checkpoint looks for the first that can express it.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", llama.read_llama, llama.write_llama, llama.TABLE),
    "mistral": Family("MistralForCausalLM", llama.read_mistral, llama.write_mistral, llama.TABLE),
    "qwen2": Family("Qwen2ForCausalLM", llama.read_qwen2, llama.write_qwen2, llama.TABLE),
    "qwen3": Family("Qwen3ForCausalLM", llama.read_qwen3, llama.write_qwen3, llama.TABLE),
}

# Keys that name code. Nothing of a checkpoint is ever run, so they are passed over and said to be.
CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "_attn_implementation", "attn_implementation")

# How a network computes, and what a run adds to it: not the checkpoint's business.
RUNTIME = ("dtype", "precision", "remat", "added")


def family(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json. ValueError that lists the known ones."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        guess = parts.suggestion(kind, FAMILIES) if isinstance(kind, str) else ""
        raise ValueError(f"config.json: model_type={kind!r} is not one of {', '.join(FAMILIES)}.{guess}")
    return FAMILIES[kind]


def config_from(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes. ValueError for what it asks and the decoder cannot do: nothing is passed over."""
    found = family(raw)
    llama.refuse(raw, "quantization_config", (None,), "quantised weights are not read; take the checkpoint they were made from")
    for key in CODE_KEYS:
        if raw.get(key) is not None:
            log.warning(
                "config.json: %s=%r names code and is ignored; model_type=%s is read as the standard one.", key, raw[key], raw["model_type"]
            )
    return found.read(raw)


def choose(config: DecoderConfig) -> str:
    """The first model_type whose config.json can say all that the config says. ValueError if there is none."""
    for name, candidate in FAMILIES.items():
        with contextlib.suppress(ValueError):
            if architecture(candidate.read(candidate.write(config))) == architecture(config):
                return name
    raise ValueError(f"None of {', '.join(FAMILIES)} can express this network, so it cannot be exported: {config}.")


def config_to(
    config: DecoderConfig,
    original: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    bos: int | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """The config.json of a network.

    With the `original` that the network was read from, its keys stay, and only what differs is changed. Without one, the first family
    that can express the network is taken; bos, eos and pad are its special tokens' ids. `config.vocab_size` counts the rows written.
    """
    if original is None:
        name = choose(config)
        ids = {"bos_token_id": bos, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos, "pad_token_id": pad}
        return {"model_type": name, "architectures": [FAMILIES[name].architecture], "dtype": dtype, **FAMILIES[name].write(config), **ids}
    found = family(original)
    raw = {**original, "vocab_size": config.vocab_size, "tie_word_embeddings": config.tied, "architectures": [found.architecture]}
    raw["torch_dtype" if "torch_dtype" in original and "dtype" not in original else "dtype"] = dtype
    if architecture(found.read(raw)) != architecture(config):
        raw.update(found.write(config))
    if architecture(found.read(raw)) != architecture(config):
        raise ValueError(f"The network is no longer a {original['model_type']}: its config.json cannot express {config}.")
    return raw


def architecture(config: DecoderConfig) -> dict[str, Any]:
    """A config's fields, without those that only say how it is computed."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in RUNTIME}
