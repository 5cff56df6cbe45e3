"""Parts of a run as named functions: a function's keyword-only parameters are its section's keys and hold the only defaults."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

Part = Callable[..., Any]


class Required:
    """Stands for the value of a key that has no default and was not set. Names the type it must have."""

    def __init__(self, kind: type):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind.__name__}, required>"


def schema(part: Part) -> dict[str, Any]:
    """{key: default} of a part; a key without a default has a `Required` in its place."""
    parameters = inspect.signature(part).parameters.values()
    keyword = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: Required(kind(part, p.name)) if p.default is inspect.Parameter.empty else p.default for p in keyword}


def kind(part: Part, key: str) -> type:
    """The type of a key's values, from its annotation: `int | None` gives int."""
    hint = _hints(part).get(key, str)
    options = [t for t in getattr(hint, "__args__", ()) if t is not type(None)]
    union = type(None) in getattr(hint, "__args__", ())
    hint = options[0] if union else hint
    return getattr(hint, "__origin__", hint)


_hints = functools.cache(get_type_hints)  # slow, and asked for with every key


def pick(table: Mapping[str, Part], name: str, where: str) -> Part:
    """The part called `name`. ValueError that lists the table, if there is none."""
    if name in table:
        return table[name]
    raise ValueError(f"{where}.name={name!r} is not one of {', '.join(table)}.{suggestion(name, table)}")


def complete(part: Part, given: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> dict[str, Any]:
    """`given` over the part's defaults. ValueError for a key that the part does not have (`also` lists extra ones)."""
    keys = schema(part)
    known = [*keys, *also]
    for key in given:
        if key not in known:
            raise ValueError(f"Unknown config key {where}.{key}.{suggestion(key, known)} It takes: {', '.join(known)}.")
    return {**keys, **given}


def bind(part: Part, settings: Mapping[str, Any], where: str) -> Part:
    """The part with all its keys set. ValueError for a required key without a value."""
    keys = schema(part)
    for key in keys:
        if isinstance(settings.get(key), Required) or (isinstance(keys[key], Required) and settings.get(key) is None):
            raise ValueError(f"{where}.{key} has no value and no default. Set --config.{where}.{key}=VALUE.")
    return functools.partial(part, **{key: settings[key] for key in keys})


def extended(part: Part, wrapper: Part, key: str, kind: str) -> Part:
    """`wrapper`, which has a further key before it calls `part`, with a signature that says so: by default the key holds nothing."""
    further = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=(), annotation=kind)
    signature = inspect.signature(part)
    wrapper.__signature__ = signature.replace(parameters=[*signature.parameters.values(), further])  # pyright: ignore
    wrapper.__annotations__ = {**part.__annotations__, key: kind}
    return wrapper


# What other tools call a key: it only feeds the suggestion, it is never accepted in the key's place.
ELSEWHERE = {
    "model_name_or_path": "model.path", "base_model": "model.path", "torch_dtype": "model.dtype", "gradient_checkpointing": "model.remat",
    "load_in_4bit": "model.quantise", "load_in_8bit": "model.quantise", "quantization_bit": "model.quantise",
    "bnb_4bit_quant_type": "model.quantise", "bnb_4bit_use_double_quant": "model.quantise_scales", "loftq_config": "method.init",
    "lora_r": "method.rank", "r": "method.rank", "lora_rank": "method.rank", "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout", "lora_target_modules": "method.targets", "target_modules": "method.targets",
    "lora_target": "method.targets", "use_rslora": "method.rank_stabilized", "finetuning_type": "method.name",
    "dataset_name": "data.train.path", "dataset": "data.train.path", "data_files": "data.train.path",
    "max_length": "data.train.length", "max_seq_length": "data.train.length", "cutoff_len": "data.train.length",
    "sequence_len": "data.train.length", "max_target_length": "data.train.length", "max_source_length": "data.train.input_length",
    "max_input_length": "data.train.input_length", "text_column_name": "data.train.format.text",
    "label_column_name": "data.train.format.label", "id2label": "model.classes", "label_names": "model.classes",
    "label_smoothing_factor": "objective.label_smoothing", "class_weight": "objective.class_weights",
    "packing": "data.train.pack", "sample_packing": "data.train.pack",
    "per_device_train_batch_size": "train.batch_size", "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate", "max_steps": "train.steps", "max_grad_norm": "train.clip_norm",
    "lr": "optimizer.learning_rate", "lr_scheduler_type": "optimizer.schedule.name", "lr_scheduler": "optimizer.schedule.name",
    "warmup_steps": "optimizer.schedule.warmup_steps", "eval_steps": "eval.every", "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last", "early_stopping_patience": "eval.patience", "logging_steps": "train.log_every",
    "output_dir": "--workdir",
}  # fmt: skip


def suggestion(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for a word that is close to a known one, or that another tool uses; else ''."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    meant = ELSEWHERE.get(word) or (close[0] if close else None)
    return f" Did you mean {meant}?" if meant else ""
