"""Model cards: the README.md of an exported model or adapter, with the front matter that the Hugging Face hub reads.

A figure that is not known is left out. Of a local file only its own name is told, never the folders above it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# The ending of a model's class: the hub's name of its task, and what loads it. Of an encoder-decoder the task is not known: translation,
# summarisation and others have names of their own.
HEADS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForConditionalGeneration": (None, "AutoModelForSeq2SeqLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "Model": ("feature-extraction", "AutoModel"),
}
LICENSE = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SOMEWHERE = re.compile(r"(/|~|\.{1,2}[/\\]|\\|[A-Za-z][\w+.-]*:[/\\])")  # how a path or an address begins
CARD_BYTES = 1_000_000  # a longer README.md is not looked into
FOLDER = '"path/to/this/folder"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: what the user wrote, whether that is a hub id, what was read of it, and counts of rows of tokens and learned tokens."""

    path: str | Sequence[str]
    on_hub: bool = False
    subset: str | None = None
    split: str | None = None
    digest: str | None = None
    rows: int | None = None
    learned: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells; None where it is not known.

    adapter            whether a PEFT adapter was exported, or a whole model
    model_class        what holds the model, or an adapter's base: `architectures` in config.json
    base, base_on_hub  id or folder of the model that was tuned, and which of the two it is
    license            what `license_of` found in the base's folder
    method, objective, optimizer  sections of the run's config
    trainable, parameters  how many numbers learned, of how many in all
    embedding_rows     to which PEFT's user must resize the base's embedding, where tokens were added
    data               {"train": ..., "eval": ...}
    step, steps        updates made by the exported checkpoint, and those that the run was to make
    batch_size, length rows of an update, and tokens of a row
    tokens             trained on up to `step`, without padding
    devices            {"kind", "count"}
    dtype              of the computation
    start, end         measures of the evaluations at step 0 and at `step`; one that was not finite is None
    versions           {package: version}
    """

    adapter: bool
    model_class: str | None = None
    base: str | None = None
    base_on_hub: bool = False
    revision: str | None = None
    license: Mapping[str, Any] | None = None
    method: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] | None = None
    optimizer: Mapping[str, Any] | None = None
    trainable: int | None = None
    parameters: int | None = None
    embedding_rows: int | None = None
    data: Mapping[str, Data] = dataclasses.field(default_factory=dict)
    step: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    length: int | None = None
    tokens: int | None = None
    seed: int | None = None
    devices: Mapping[str, Any] | None = None
    dtype: str | None = None
    start: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    end: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None


def from_run(
    config: Mapping[str, Any], provenance: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], step: int | None = None, **known: Any
) -> Facts:
    """The facts in a run's own files: config.json, provenance.json and the lines of metrics.jsonl.

    Of provenance, `parameters` {"trainable", "all"} and `counts` {data set: {"rows", "learned"}} count too, where they are there.

    step   of the exported checkpoint; without it nothing is said of its measures
    known  facts that these files do not hold, or that take the place of theirs; `adapter` must be among them
    """
    model, data, train = (config.get(section, {}) for section in ("model", "data", "train"))
    base = model.get("path") if model.get("name") == "pretrained" else None
    git, count, counts = (provenance.get(key, {}) for key in ("git", "parameters", "counts"))
    found = {
        "base": base,
        "base_on_hub": base is not None and HUB_ID.fullmatch(base) is not None and not Path(base).expanduser().exists(),
        "revision": model.get("revision"),
        **{section: config.get(section) for section in ("method", "objective", "optimizer", "seed")},
        "trainable": count.get("trainable"),
        "parameters": count.get("all"),
        "data": {
            name: _data(data[name], digest, counts.get(name, {}))
            for name, digest in provenance.get("data", {}).items()
            if "path" in data.get(name, {})
        },
        "step": step,
        "steps": train.get("steps"),
        "batch_size": train.get("batch_size"),
        "length": data.get("train", {}).get("length"),
        "tokens": _tokens(metrics, step),
        "devices": provenance.get("devices"),
        "dtype": model.get("dtype"),
        "start": _measures(metrics, 0),
        "end": _measures(metrics, step),
        "versions": {**({"python": provenance["python"]} if "python" in provenance else {}), **provenance.get("packages", {})},
        "commit": git["commit"] + (" with uncommitted changes" if git["dirty"] else "") if git else None,
    }
    return Facts(**{**found, **known})


def _data(config: Mapping[str, Any], digest: str, counts: Mapping[str, int]) -> Data:
    # What was read from files has a SHA-256; a hub data set has the mark of the `datasets` library, which is shorter.
    told: dict[str, Any] = {key: config.get(key) for key in ("path", "subset", "split")}
    return Data(**told, on_hub=len(digest) != 64, digest=digest, rows=counts.get("rows"), learned=counts.get("learned"))


def _tokens(metrics: Iterable[Mapping[str, Any]], step: int | None) -> int | None:
    """Known only where every step was logged: a line tells its own step's tokens."""
    seen = {line["step"]: line["train/tokens"] for line in metrics if "train/tokens" in line}
    return int(sum(seen[i] for i in range(1, step + 1))) if step and seen.keys() >= set(range(1, step + 1)) else None


def _measures(metrics: Iterable[Mapping[str, Any]], step: int | None) -> dict[str, float | None]:
    lines = (line for line in metrics if line["step"] == step)
    return {name.removeprefix("eval/"): value for line in lines for name, value in line.items() if name.startswith("eval/")}


def license_of(directory: Path | None) -> dict[str, Any] | None:
    """What the model card in a folder says of its license; None if there is no card, or if it says nothing that can be read."""
    from huggingface_hub import metadata_load

    file = directory and directory / "README.md"
    if file is None or not file.is_file() or file.stat().st_size > CARD_BYTES:
        return None
    try:
        front = metadata_load(file) or {}
    except Exception:  # YAML of other people: whatever is wrong with it, the card goes without
        return None
    found = {key: front[key] for key in LICENSE if isinstance(front.get(key), str)}
    return found if "license" in found else None


def card(facts: Facts) -> str:
    """The README.md."""
    base = _inline(facts.base if facts.base_on_hub else _last(facts.base)) if facts.base else None
    name = f"{base or 'A model'} tuned by {_inline(facts.method['name'])}" if facts.method else base or "A model"
    what = "The adapter alone, in the format of PEFT." if facts.adapter else "The whole model, in the format of transformers."
    sections = {
        "Base": _pairs({"model": base, "revision": _text(facts.revision)}) if base else "",
        "Method": _method(facts),
        "Data": _datasets(facts.data),
        "Training": _training(facts),
        "Evaluation": _evaluation(facts),
        "Use": _use(facts),
        "Versions": _pairs({**{_inline(k): _inline(v) for k, v in facts.versions.items()}, "commit": _text(facts.commit)}),
    }
    blocks = [_front(facts), f"# {name}", what, *(f"## {title}\n\n{body}" for title, body in sections.items() if body)]
    return "\n\n".join(blocks) + "\n"


def _front(facts: Facts) -> str:
    on_hub = facts.base if facts.base_on_hub else None
    license = dict(facts.license or {})
    link = license.pop("license_link", "")
    if link and on_hub and not link.startswith("http"):  # a file of the base
        link = f"https://huggingface.co/{on_hub}/blob/main/{link}"
    entries = {
        "base_model": on_hub,
        "base_model_relation": on_hub and ("adapter" if facts.adapter else "finetune"),
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": _head(facts.model_class)[0],
        "tags": ["tuning", *([facts.method["name"]] if facts.method else [])],
        "datasets": list(dict.fromkeys(one for data in facts.data.values() if data.on_hub for one in _paths(data))),
        **license,
        "license_link": link if link.startswith("http") else None,
    }
    # JSON is YAML, and its quotes keep "no" and "1.0" texts.
    return "\n".join(
        ["---", *(f"{key}: {json.dumps(_plain(value), ensure_ascii=False)}" for key, value in entries.items() if value), "---"]
    )


def _method(facts: Facts) -> str:
    some, every = facts.trainable, facts.parameters
    share = f" of {every:,} ({some / every:.4%})" if some and every else ""
    keys = {_inline(key): _shown(value) for key, value in (facts.method or {}).items()}
    return _pairs({**keys, "trainable parameters": f"{some:,}{share}" if some else None})


def _datasets(data: Mapping[str, Data]) -> str:
    rows = [
        (
            _inline(name),
            ", ".join(map(_inline, _paths(one))),
            _text(one.subset),
            _text(one.split),
            _count(one.rows),
            _count(one.learned),
            one.digest and f"{'sha256' if len(one.digest) == 64 else 'fingerprint'} {_inline(one.digest)}",
        )
        for name, one in data.items()
    ]
    return _table(("", "source", "subset", "split", "rows", "learned tokens", "digest"), rows)


def _training(facts: Facts) -> str:
    optimizer = dict(facts.optimizer or {})
    rate = optimizer.pop("learning_rate", None)
    steps = None if facts.step is None else f"{facts.step:,}" + (f" of {facts.steps:,}" if facts.steps not in (None, facts.step) else "")
    return _pairs(
        {
            "steps": steps,
            "rows per step": _count(facts.batch_size),
            "tokens per row": _count(facts.length),
            "tokens trained on": _count(facts.tokens),
            "objective": _shown(facts.objective) if facts.objective else None,
            "optimiser": _shown(optimizer) if optimizer else None,
            "learning rate": None if rate is None else _shown(rate),
            "seed": None if facts.seed is None else str(facts.seed),
            "hardware": f"{facts.devices['count']} × {_inline(facts.devices['kind'])}" if facts.devices else None,
            "dtype": _text(facts.dtype),
        }
    )


def _evaluation(facts: Facts) -> str:
    def cell(measures: Mapping[str, float | None], name: str) -> str | None:
        value = measures.get(name)
        return f"{value:.5g}" if value is not None else "not finite" if name in measures else None

    names = dict.fromkeys([*facts.start, *facts.end])
    columns = ("measure", "step 0", f"step {facts.step:,}" if facts.step else "exported")
    ends = {} if facts.step == 0 else facts.end
    return _table(columns, [(_inline(name), cell(facts.start, name), cell(ends, name)) for name in names])


def _use(facts: Facts) -> str:
    auto, base, version = _head(facts.model_class)[1], json.dumps("path/to/the/base"), ""
    if facts.base_on_hub:
        base = json.dumps(facts.base)
        version = f", revision={json.dumps(facts.revision)}" if facts.revision else ""
    load = f"tuning.load({base}, adapter={FOLDER}{version})" if facts.adapter else f"tuning.load({FOLDER})"
    ours = ["import tuning", "", f"model = {load}"]
    theirs = [f"from transformers import {auto}, AutoTokenizer", ""]
    if facts.adapter:
        theirs = ["from peft import PeftModel", *theirs, f"base = {auto}.from_pretrained({base}{version})"]
        theirs += [f"base.resize_token_embeddings({facts.embedding_rows})"] if facts.embedding_rows else []
        theirs += [f"model = PeftModel.from_pretrained(base, {FOLDER})"]
    else:
        theirs += [f"model = {auto}.from_pretrained({FOLDER})"]
    theirs += [f"tokenizer = AutoTokenizer.from_pretrained({FOLDER})"]
    return "\n\n".join("\n".join(["```python", *lines, "```"]) for lines in ([theirs] if auto else []) + [ours])


def _head(model_class: str | None) -> tuple[str | None, str | None]:
    return next((found for ending, found in HEADS.items() if (model_class or "").endswith(ending)), (None, None))


def _paths(data: Data) -> list[str]:
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    return paths if data.on_hub else [_last(path) for path in paths]


def _last(path: str) -> str:
    """A path's last name, with either kind of slash."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _plain(value: Any) -> Any:
    """Text without line breaks, control characters and the marks that turn the direction of writing."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _inline(text: str) -> str:
    """A user's text as Markdown that shows just that, in a table too. Of a path outside of the working folder only the last name."""
    text = _plain(_last(text) if SOMEWHERE.match(text) else text)
    return re.sub(r"([\\`*_\[\]<>|~&$#]|(?<=\w):(?=//))", r"\\\1", text)


def _text(text: str | None) -> str | None:
    return _inline(text) if text else None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(f"{_inline(key)} {_shown(one)}" for key, one in value.items() if key != "name")
        name = _shown(value["name"]) if "name" in value else ""
        return f"{name} ({keys})" if name and keys else name or keys
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return _inline({True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value))


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _pairs(rows: Mapping[str, str | None]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in rows.items() if value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """A Markdown table without the columns of which nothing is known; nothing without a row."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line[i] or "" for i in kept) + " |" for line in lines) if len(kept) > 1 else ""
