"""The published families by model_type: config.json <-> the config of a network, and where its tensors go."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from tuning.core import parts
from tuning.hub import bert, bloom, falcon, gemma, gpt2, llama, mixtral, modernbert, neox, olmo2, phi3, recurrent, smollm3, t5
from tuning.hub.family import Config, Family, Form, Raw, refuse
from tuning.hub.names import Row, Table

log = logging.getLogger(__name__)

# In the order in which a network that was not read from a checkpoint looks for the first that can express it.
FAMILIES: dict[str, Family] = {
    name: found
    for module in (llama, mixtral, gemma, olmo2, smollm3, phi3, gpt2, neox, falcon, bloom, t5, bert, modernbert, recurrent)
    for name, found in module.FAMILIES.items()
}

# Models that read more than text: config.json -> that of the text model inside.
INSIDE: dict[str, Callable[[Raw], dict[str, Any]]] = {**gemma.INSIDE}

# Keys that name code. Nothing of a checkpoint is ever run, so they are passed over and said to be.
CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "_attn_implementation", "attn_implementation")

# How a network computes, and what a run adds to it: not the checkpoint's business.
RUNTIME = ("dtype", "precision", "remat", "added", "dropout", "attention_dropout", "mlp_dropout", "dense_dropout")

# model.head, and the ending of the class that has it.
HEADS = {
    "language_model": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "masked_language_model": ("ForMaskedLM",),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "question_answering": ("ForQuestionAnswering",),
    "none": ("Model",),
}


def family(raw: Raw) -> Family:
    """The family of a config.json. ValueError that lists the known ones."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        guess = parts.suggestion(kind, FAMILIES) if isinstance(kind, str) else ""
        raise ValueError(f"config.json: model_type={kind!r} is not one of {', '.join(FAMILIES)}.{guess}")
    return FAMILIES[kind]


def form(raw: Raw) -> Form:
    """The class that a config.json names. ValueError for one that the family does not have."""
    forms = family(raw).forms
    name = (raw.get("architectures") or [next(iter(forms))])[0]
    if name not in forms:
        raise ValueError(
            f"config.json: architectures={raw['architectures']} is not one of {', '.join(forms)}.{parts.suggestion(str(name), forms)} "
            "Set it to the class that the tensors belong to."
        )
    return forms[name]


def table(raw: Raw) -> Table:
    """Where the tensors of a checkpoint with this config.json go."""
    found, top = family(raw), form(raw)
    body = found.table(raw) if callable(found.table) else found.table
    if top.bare:
        body = [Row(r.leaf, r.tensor.removeprefix(found.prefix), r.transposed) for r in body]
    return (*body, *top.table)


def config_from(raw: Raw) -> Config:
    """The network that a config.json describes. ValueError for what it asks and the network cannot do: nothing is passed over."""
    found, head = family(raw), form(raw).head
    refuse(raw, "quantization_config", (None,), "quantised weights are not read; take the checkpoint they were made from")
    for key in CODE_KEYS:
        if raw.get(key) is not None:
            log.warning(
                "config.json: %s=%r names code and is ignored; model_type=%s is read as the standard one.", key, raw[key], raw["model_type"]
            )
    return found.read(raw).replace(head=head(raw))


def with_head(raw: Raw, head: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of the same body with another head (a key of HEADS), or with other classes. ValueError if the family has none."""
    forms = family(raw).forms
    if head and head not in HEADS:
        raise ValueError(f"model.head={head!r} is not one of {', '.join(HEADS)}.{parts.suggestion(head, HEADS)}")
    kind = lambda name: next((kind for kind, endings in HEADS.items() if name.endswith(endings)), None)  # noqa: E731
    names = [name for name in forms if kind(name) == head] if head else list(raw.get("architectures") or forms)
    if not names:
        raise ValueError(f"model.head={head!r}: {raw['model_type']} has none. Its classes are {', '.join(forms)}.")
    changed = {**raw, "architectures": names[:1]}
    if classes:
        if "Classification" not in names[0]:
            raise ValueError(f"model.classes={classes} need model.head=sequence_classification or token_classification; it is {names[0]}.")
        if len(set(classes)) < len(classes):
            raise ValueError(f"model.classes={classes} has a name twice.")
        ids = {str(i): name for i, name in enumerate(classes)}
        changed |= {"id2label": ids, "label2id": {name: int(i) for i, name in ids.items()}, "problem_type": "single_label_classification"}
        changed.pop("num_labels", None)
    elif "Classification" in names[0] and names[0] not in (raw.get("architectures") or ()):
        raise ValueError(f"model.head={head!r} is new to this checkpoint and needs model.classes, the names of the classes.")
    return changed


def choose(config: Config) -> str:
    """The first model_type whose config.json can say all that the config says. ValueError if there is none."""
    for name in FAMILIES:
        with contextlib.suppress(ValueError, AttributeError):  # a network of another shape has not the fields that are asked for
            if architecture(config_from(_written(name, config))) == architecture(config):
                return name
    raise ValueError(f"None of {', '.join(FAMILIES)} can express this network, so it cannot be exported: {config}.")


def _written(name: str, config: Config) -> dict[str, Any]:
    """The config.json of a network as one of this family, with the class that has its kind of head."""
    forms, raw = FAMILIES[name].forms, {"model_type": name, **FAMILIES[name].write(config)}
    if config.head.classes:
        raw["id2label"] = {str(i): label for i, label in enumerate(config.head.classes)}
        raw.setdefault("classifier_dropout", config.head.dropout)
    for form_name, candidate in forms.items():
        head = candidate.head(raw)
        if (head.output, head.pool, bool(head.classes)) == (config.head.output, config.head.pool, bool(config.head.classes)):
            return {**raw, "architectures": [form_name]}
    raise ValueError(f"No class of {', '.join(forms)} has the head {config.head}.")


def config_to(
    config: Config,
    original: Raw | None = None,
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
        ids = {"bos_token_id": bos, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos, "pad_token_id": pad}
        return {"dtype": dtype, **ids, **_written(choose(config), config)}  # some write a pad_token_id, from which positions are counted
    found = family(original)
    raw = {**original, "vocab_size": config.vocab_size}
    raw.setdefault("architectures", [next(iter(found.forms))])
    if saved := form(raw).saved:
        raw["architectures"] = [saved]
    raw["torch_dtype" if "torch_dtype" in original and "dtype" not in original else "dtype"] = dtype
    if architecture(config_from(raw)) != architecture(config):
        raw.update(found.write(config))
    if architecture(config_from(raw)) != architecture(config):
        raise ValueError(f"The network is no longer a {original['model_type']}: its config.json cannot express {config}.")
    return raw


def architecture(config: Config) -> dict[str, Any]:
    """A config's fields, without those that only say how it is computed."""
    fields = dataclasses.asdict(config)
    strip = lambda value: {k: strip(v) for k, v in value.items() if k not in RUNTIME} if isinstance(value, Mapping) else value  # noqa: E731
    return strip(fields)
