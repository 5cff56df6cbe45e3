"""What a published family is, and how its config.json is read: keys with their defaults, and an error for what is not supported.

Keys, defaults and meaning are those of transformers' configuration classes. Both layouts are read: `rope_theta`, `rope_scaling` and
`torch_dtype` of transformers 4, and `rope_parameters` and `dtype` of transformers 5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tuning.hub.names import Row, Table
from tuning.models.heads import HeadConfig

Raw = Mapping[str, Any]  # config.json as it was read
Config = Any  # of a network: TransformerConfig, EncoderDecoderConfig, RecurrentConfig


class Form(NamedTuple):
    """One class of a family: what stands on top of its body.

    head   the head that a config.json describes
    table  where the head's tensors go
    bare   whether the body's tensors go without the family's prefix
    saved  the class that it is written as, where it is read as another
    """

    head: Callable[[Raw], HeadConfig]
    table: Table = ()
    bare: bool = False
    saved: str = ""


class Family(NamedTuple):
    """One model_type.

    forms    by the name of transformers' class; the first is meant where config.json names none
    read     config.json -> the config of a network, its head left out
    write    and back
    table    where the body's tensors go, or what tells it from config.json
    prefix   of the body's tensors
    aliases  {tensor: the one that it repeats}: files may have them, and they must be the same
    ignored  regular expression for tensors that hold constants, which old checkpoints stored
    untie    what config.json should have said where it says that the head is tied, and the file has another one; None: that is an error
    within   prefixes of the tensors in the files of larger models that the family is a part of
    """

    forms: Mapping[str, Form]
    read: Callable[[Raw], Config]
    write: Callable[[Any], dict[str, Any]]
    table: Table | Callable[[Raw], Table]
    prefix: str = "model."
    aliases: Mapping[str, str] = {}
    ignored: str = r"(^|\.)rotary_emb\.inv_freq$"
    untie: Callable[[Raw], dict[str, Any]] | None = None
    within: tuple[str, ...] = ()


# Reading keys.


def refuse(raw: Raw, key: str, neutral: tuple, why: str) -> None:
    """ValueError if a key has any value but the neutral ones (or is absent)."""
    if key in raw and raw[key] not in neutral:
        raise ValueError(f"config.json: {key}={raw[key]!r} is not supported: {why}.")


def value(raw: Raw, key: str, default: Any) -> Any:
    """The key's value; the default where it is absent or null."""
    found = raw.get(key)
    return default if found is None else found


def renamed(raw: Raw, names: Mapping[str, str]) -> Raw:
    """config.json where keys that also go by other names, {other: own}, have their own. As in transformers the other name comes first."""
    return {**raw, **{own: raw[other] for other, own in names.items() if raw.get(other) is not None}}


def size(raw: Raw, key: str, default: int | None = None) -> int:
    """A whole number."""
    found = value(raw, key, default)
    if type(found) is not int:
        raise ValueError(f"config.json: {key}={found!r} must be a whole number.")
    return found


# What config.json calls an activation, and what it is here.
ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "relu": "relu", "tanh": "tanh",
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def activation(raw: Raw, key: str = "hidden_act", default: str = "silu") -> str:
    """The activation that a key names."""
    name = value(raw, key, default)
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"config.json: {key}={name!r} is not supported; known are {', '.join(ACTIVATION_NAMES)}.")
    return ACTIVATION_NAMES[name]


def activation_name(ours: str) -> str:
    """What config.json calls an activation of ours."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(ours, ours)


def layer_kinds(raw: Raw, names: tuple[str, ...], default: list[str]) -> list[str]:
    """`layer_types`, one of `names` for each layer."""
    kinds = value(raw, "layer_types", default)
    if len(kinds) != size(raw, "num_hidden_layers") or set(kinds) - set(names):
        raise ValueError(
            f"config.json: layer_types={kinds} must name one of {', '.join(names)} for each of the {raw['num_hidden_layers']} layers."
        )
    return list(kinds)


def windows(raw: Raw, default: list[str], window: int | None) -> list[int | None]:
    """The window of each layer by its `layer_types`: None for full_attention."""
    kinds = layer_kinds(raw, ("full_attention", "sliding_attention"), default)
    if "sliding_attention" in kinds and window is None:
        raise ValueError(f"config.json: layer_types={kinds} have a sliding window, and sliding_window says none.")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def write_sizes(c: Any) -> dict[str, Any]:
    """The sizes of a TransformerConfig under the names that most families have for them."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
    }


# Rotary positions: the numbers that each kind needs.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}
ROPE_SILENT = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "mscale", "mscale_all_dim", "finetuned")


class Rope(NamedTuple):
    """theta and scaling of a network's rotary frequencies, and the share of each head that is rotated."""

    theta: float
    scaling: dict[str, Any] | None
    share: float


def rope(raw: Raw, layers: str = "", theta: float = 10_000.0, share: float = 1.0) -> Rope:
    """The rotary numbers of either layout; of one kind of `layers`, where these differ.

    A `rope_scaling` that is not empty comes before `rope_parameters`, as in transformers.
    """
    said = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(v, Mapping) for v in said.values()):
        if layers not in said:
            raise ValueError(f"config.json: rope_parameters={dict(said)} differ between layers, which this family's do not.")
        said = said[layers]
    theta = float(value(said, "rope_theta", value(raw, "rope_theta", theta)))
    share = float(value(said, "partial_rotary_factor", value(raw, "partial_rotary_factor", share)))
    kind = said.get("rope_type") or said.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_KEYS:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known are {', '.join(ROPE_KEYS)}.")
    if kind == "default":
        return Rope(theta, None, share)
    longest = size(raw, "max_position_embeddings")
    original = value(raw, "original_max_position_embeddings", value(said, "original_max_position_embeddings", longest))
    numbers = {**said, "original_max_position_embeddings": original, "max_position_embeddings": longest}
    numbers = {"yarn": _yarn, "longrope": _longrope}.get(kind, dict)(numbers)
    wanted = ROPE_KEYS[kind]
    if absent := [key for key in wanted if not isinstance(numbers.get(key), int | float | list | tuple)]:
        raise ValueError(f"config.json: rope_type={kind!r} needs the numbers {', '.join(absent)}; it says {dict(said)}.")
    return Rope(theta, {"rope_type": kind, **{k: tuple(v) if isinstance(v := numbers[k], list) else v for k in wanted}}, share)


def _yarn(said: Mapping[str, Any]) -> dict[str, Any]:
    factor: Any = said.get("factor")
    scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    found = {
        **said,
        "beta_fast": said.get("beta_fast") or 32,
        "beta_slow": said.get("beta_slow") or 1,
        "truncate": value(said, "truncate", True),
    }
    if factor is not None and said.get("attention_factor") is None:
        both = said.get("mscale") and said.get("mscale_all_dim")
        found["attention_factor"] = scale(said["mscale"]) / scale(said["mscale_all_dim"]) if both else scale(1)
    return found


def _longrope(said: Mapping[str, Any]) -> dict[str, Any]:
    original, factor = (
        said["original_max_position_embeddings"],
        said.get("factor") or said["max_position_embeddings"] / said["original_max_position_embeddings"],
    )
    grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {**said, "attention_factor": value(said, "attention_factor", grown)}


def write_rope(theta: float, scaling: Mapping[str, Any] | None, share: float = 1.0) -> dict[str, Any]:
    """`rope_parameters` of these numbers."""
    kept = {key: list(v) if isinstance(v, tuple) else v for key, v in (scaling or {}).items() if key != "max_position_embeddings"}
    return {"rope_theta": theta, "rope_type": "default", **kept, **({"partial_rotary_factor": share} if share != 1 else {})}


# Heads.


def classes(raw: Raw) -> tuple[str, ...]:
    """The names of a classifier's classes, in the order of their ids."""
    named = raw.get("id2label")
    names = (
        tuple(str(named[key]) for key in sorted(named, key=int))
        if named
        else tuple(f"LABEL_{i}" for i in range(value(raw, "num_labels", 2)))
    )
    if len(names) < 2 or raw.get("problem_type") not in (None, "single_label_classification"):
        raise ValueError(
            f"config.json: problem_type={raw.get('problem_type')!r} with {len(names)} labels: only one class of several is supported."
        )
    return names


def speaks(raw: Raw, **settings: Any) -> HeadConfig:
    """A head over the vocabulary."""
    return HeadConfig(**settings)


def sorts(raw: Raw, **settings: Any) -> HeadConfig:
    """A head over classes."""
    return HeadConfig(output="classes", classes=classes(raw), **settings)


def spans(raw: Raw, **settings: Any) -> HeadConfig:
    """A head for extractive question answering: how likely an answer starts, and ends, at each token."""
    return HeadConfig(output="spans", **{"bias": True, **settings})


SPANS = Form(spans, (Row("head/kernel", "qa_outputs.weight", transposed=True), Row("head/bias", "qa_outputs.bias")))


def bare(raw: Raw) -> HeadConfig:
    """No head."""
    return HeadConfig(output="hidden")


def tag_dropout(raw: Raw, otherwise: float = 0.1) -> float:
    """The rate before a decoder's token classifier."""
    return float(value(raw, "classifier_dropout", value(raw, "hidden_dropout", otherwise)))


def decoder_forms(
    name: str, head: str = "lm_head", body: str = "Model", classifier: str = "score", causal: str = "ForCausalLM",
    rate: Callable[[Raw], float] = tag_dropout, **settings: Any,
) -> dict[str, Form]:  # fmt: skip
    """The classes that decoders have: causal language model, sequence and token classifier, and the body alone.

    name        of the classes, "Llama"; body, the ending of the headless one's name; causal, that of the language model's
    head        what the language model's output is called; classifier, that of the token classifier; rate, of dropout before the latter
    settings    of the language model's HeadConfig
    """
    kernel = lambda tensor: Row("head/kernel", f"{tensor}.weight", transposed=True)  # noqa: E731
    return {
        f"{name}{causal}": Form(functools.partial(speaks, **settings), (kernel(head),)),
        f"{name}ForSequenceClassification": Form(functools.partial(sorts, pool="last"), (kernel("score"),)),
        f"{name}ForTokenClassification": Form(
            lambda raw: sorts(raw, bias=True, dropout=rate(raw)), (kernel(classifier), Row("head/bias", f"{classifier}.bias"))
        ),
        f"{name}{body}": Form(bare, bare=True),
    }
