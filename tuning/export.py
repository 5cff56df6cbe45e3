"""A tuned model as others read it: a Hugging Face directory, or a PEFT adapter."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuning import build
from tuning.core import tree
from tuning.core.types import Batch, Inputs, Tree
from tuning.hub import adapters, card, checkpoint, families, files, sentences, tokenizer
from tuning.methods.method import added
from tuning.nn import stack
from tuning.nn.weight import value
from tuning.training import workdir, writer

log = logging.getLogger(__name__)

# Largest difference of a logit, relative to the largest logit, that rounding explains.
FOLD_BOUND = {"float32": 1e-4, "bfloat16": 5e-2}


# What PEFT calls the task of a model, by how it reads and what its head says; and where that is a new head, by it and its pooling.
TASKS = {("decoder", "vocabulary"): "CAUSAL_LM", ("encoder_decoder", "vocabulary"): "SEQ_2_SEQ_LM"}
NEW_HEADS = {("classes", True): "SEQ_CLS", ("classes", False): "TOKEN_CLS", ("spans", False): "QUESTION_ANS"}


def write(
    m: build.Model, params: Tree, method: Mapping[str, Any], directory: Path, format: str, merge: bool, run: Path | None = None,
    step: int | None = None, shard_bytes: int = files.SHARD_BYTES,
) -> Path:  # fmt: skip
    """Writes `directory`, with a model card; `method` is the config of the method that tuned the model, at `step` of the `run`.

    ValueError where the format cannot hold the model, or where merging changes its outputs.
    """
    if format not in ("hf", "peft"):
        raise ValueError(f"--format={format!r} is not one of hf, peft.")
    if format == "peft":
        adapters.type_of(method["name"])
    if format == "hf" and not merge and any(map(added, tree.flatten(params))):
        raise ValueError("--format=hf holds no adapter: add --merge to fold it into the weights, or use --format=peft.")
    if format == "hf" and m.method.fold is None:
        raise ValueError(f"What {method['name']!r} adds cannot be folded into the weights. Use --format=peft, or load the run as it is.")
    directory.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        _peft(m, params, method, directory)
    else:
        _hf(m, params, directory, shard_bytes)
    if jax.process_index() == 0:
        (directory / "README.md").write_text(_card(m, method, format, run, step), encoding="utf-8")
    return directory


def _card(m: build.Model, method: Mapping[str, Any], format: str, run: Path | None, step: int | None) -> str:
    source, tuned = m.source, tree.split(m.layout, m.tuned)[0]
    config: dict[str, Any] = {"model": {"name": "pretrained", "path": source.path, "dtype": source.config.dtype}}
    if run is not None or format == "peft" or method["name"] != "full":  # what was loaded and written again was not tuned
        config["method"] = dict(method)
    provenance, metrics = {}, []
    if run is not None:
        config, provenance = workdir.read_config(run), files.read_json(run / "provenance.json")
        metrics = writer.read(run / "metrics.jsonl")
    known = dict(
        adapter=format == "peft", model_class=(families.config_to(source.config, source.published)["architectures"])[0],
        license=card.license_of(source.directory), trainable=tree.size(tuned) if run else None, parameters=tree.size(m.layout),
        embedding_rows=sum(source.config.added) or None,
    )  # fmt: skip
    return card.card(card.from_run(config, provenance, metrics, step, **known))


def _peft(m: build.Model, params: Tree, method: Mapping[str, Any], directory: Path) -> None:
    c, ours = m.source.config, lambda name: added(name) or name in build.ADDED
    beside = {name.rpartition("/")[0] for name in tree.flatten(params) if m.tuned(name) and not ours(name)}  # PEFT keeps whole modules
    leaves, _ = tree.split(m.method.bare(params), lambda name: ours(name) or name.rpartition("/")[0] in beside)
    new = any(name.startswith("head/") and not ours(name) for name in tree.flatten(leaves))
    task = (NEW_HEADS.get((c.head.output, bool(c.head.pool))) if new else None) or TASKS.get((c.reads, c.head.output))
    adapters.write(
        directory, jax.tree.map(lambda x: x.astype(jnp.float32), leaves), m.source.table, build.outline(m.source), method, added=c.added,
        copies=_copies(m), base_model=m.source.path, revision=m.source.revision, task_type=task,
        heads=(c.decoder if c.reads == "encoder_decoder" else c).heads,
    )  # fmt: skip
    if m.source.tokenizer is not None:
        tokenizer.save(m.source.tokenizer, directory)


def _copies(m: build.Model) -> list[str]:
    """The modules that share the embedding's weights."""
    c, named = m.source.config, {row.leaf: row.tensor for row in m.source.table}
    aliases = families.family(m.source.published or families.config_to(c)).aliases
    found = [alias for alias, tensor in aliases.items() if tensor == named["embed/table"]]
    if c.tied and c.head.output == "vocabulary":
        found.append(named["head/kernel"])
    return [tensor.removesuffix(".weight") for tensor in found]


def _hf(m: build.Model, params: Tree, directory: Path, shard_bytes: int) -> None:
    source = m.source
    if source.storage is not None:
        log.warning("The base was kept in %s: what is exported are the values of its codes, with what was tuned.", source.storage.kind)
    plain = build.model(dataclasses.replace(source, storage=None), build.METHODS["full"](build.outline(source)), m.mesh)
    assert m.method.fold is not None
    folded = tree.map_named(lambda _, leaf: value(leaf), jax.jit(m.method.fold)(params))
    folded = restack(folded, plain.layout)
    _compare(m, params, plain, folded)
    if source.directory is not None and source.config.head.output == "hidden":
        sentences.copy(source.directory, directory)
    there = source.directory / "generation_config.json" if source.directory else None
    checkpoint.save(
        directory, folded, source.config, original=source.published, tokens=source.tokenizer, dtype=source.config.dtype,
        generation=files.read_json(there) if there and there.is_file() else None, shard_bytes=shard_bytes,
    )  # fmt: skip


def restack(params: Tree, like: Tree) -> Tree:
    """The parameters in the stacks of `like`, where a method had cut them otherwise."""
    have, want = tree.flatten(params), tree.flatten(like)
    layers: dict[tuple[str, int], tuple[str, int]] = {}  # (leaf without its layers, layer) -> where it stands
    for name in have:
        kind, span = stack.apart(name)
        layers |= {(kind, layer): (name, row) for row, layer in enumerate(span or ())}

    def one(name: str):
        kind, span = stack.apart(name)
        if name in have or span is None:
            return have[name]
        places = [layers[kind, layer] for layer in span]
        return jnp.stack([have[leaf][row] for leaf, row in places])

    return tree.unflatten({name: one(name) for name in want})


def _compare(m: build.Model, params: Tree, plain: build.Model, folded: Tree) -> None:
    """The exported weights must give the logits of the model they came from."""
    config = m.source.config
    ids = np.random.default_rng(0).integers(0, config.vocabulary, (1, min(32, config.max_length))).astype(np.int32)
    ones = np.ones_like(ids)
    positions = ones.cumsum(1, dtype=np.int32) - 1
    inputs = Inputs(ids, ones, positions) if config.reads == "encoder_decoder" else None
    batch = Batch(ids, ids, ones, ones, positions, None, inputs)

    def logits(network, params):
        hidden, head, _ = network.apply(params, batch)
        return head(hidden)

    with jax.set_mesh(m.mesh):
        before, after = (np.asarray(jax.jit(logits, static_argnums=0)(*pair)) for pair in ((m.network, params), (plain.network, folded)))
    gap = float(np.abs(after - before).max() / max(1.0, np.abs(before).max()))
    if not gap <= FOLD_BOUND[config.dtype]:
        raise ValueError(f"The exported weights give other logits: relative difference {gap:.2e}. Load with --dtype=float32 to export.")
