"""A tuned model as others read it: a Hugging Face directory, or a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuning import build
from tuning.core import tree
from tuning.core.types import Batch, Tree
from tuning.hub import adapters, checkpoint, files, tokenizer
from tuning.nn.stack import layer_range

# Largest difference of a logit, relative to the largest logit, that rounding explains.
FOLD_BOUND = {"float32": 1e-4, "bfloat16": 5e-2}


def write(m: build.Model, params: Tree, method: Mapping[str, Any], directory: Path, format: str, merge: bool) -> Path:
    """Writes `directory`; `method` is the config of the method that tuned the model.

    ValueError where the format cannot hold the model, or where merging changes its outputs.
    """
    if format not in ("hf", "peft"):
        raise ValueError(f"--format={format!r} is not one of hf, peft.")
    if format == "peft" and method["name"] != "lora":
        raise ValueError(f"--format=peft writes an adapter, and this model was tuned by {method['name']!r}. Use --format=hf.")
    if format == "hf" and not merge and any("/adapter/" in name for name in tree.flatten(params)):
        raise ValueError("--format=hf holds no adapter: add --merge to fold it into the weights, or use --format=peft.")
    directory.mkdir(parents=True, exist_ok=True)
    (_peft if format == "peft" else _hf)(m, params, method, directory)
    return directory


def _peft(m: build.Model, params: Tree, method: Mapping[str, Any], directory: Path) -> None:
    leaves, _ = tree.split(params, lambda name: "/adapter/" in name or name in build.ADDED)
    adapters.write(
        directory, jax.tree.map(lambda x: x.astype(jnp.float32), leaves), m.source.table, rank=method["rank"], alpha=method["alpha"],
        dropout=method["dropout"], rank_stabilized=method["rank_stabilized"], layers=m.source.config.layers, added=m.source.config.added,
        base_model=m.source.path, revision=m.source.revision,
    )  # fmt: skip
    if m.source.tokenizer is not None:
        tokenizer.save(m.source.tokenizer, directory)


def _hf(m: build.Model, params: Tree, method: Mapping[str, Any], directory: Path) -> None:
    source = m.source
    plain = build.model(source, build.METHODS["full"](build.outline(source)), m.mesh)
    folded = join(jax.jit(m.method.fold)(params), source.config.layers)
    _compare(m, params, plain, folded)
    there = source.directory / "generation_config.json" if source.directory else None
    checkpoint.save(
        directory, folded, source.config, original=source.published, tokens=source.tokenizer, dtype=source.config.dtype,
        generation=files.read_json(there) if there and there.is_file() else None,
    )  # fmt: skip


def join(params: Tree, layers: int) -> Tree:
    """The parameters with the segments of a stack that a method had cut joined again."""
    pieces: dict[str, list] = {}
    for name, leaf in sorted(tree.flatten(params).items(), key=lambda item: layer_range(item[0]) or (0, 0)):
        place = name.split("/", 2)
        pieces.setdefault(f"blocks/0-{layers - 1}/{place[2]}" if layer_range(name) else name, []).append(leaf)
    return tree.unflatten({n: leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves) for n, leaves in pieces.items()})


def _compare(m: build.Model, params: Tree, plain: build.Model, folded: Tree) -> None:
    """The exported weights must give the logits of the model they came from."""
    config = m.source.config
    ids = np.random.default_rng(0).integers(0, config.vocabulary, (1, min(32, config.max_length))).astype(np.int32)
    ones = np.ones_like(ids)
    batch = Batch(ids, ids, ones, ones, ones.cumsum(1, dtype=np.int32) - 1)

    def logits(network, params):
        hidden, head, _ = network.apply(params, batch)
        return head(hidden)

    with jax.set_mesh(m.mesh):
        before, after = (np.asarray(jax.jit(logits, static_argnums=0)(*pair)) for pair in ((m.network, params), (plain.network, folded)))
    gap = float(np.abs(after - before).max() / max(1.0, np.abs(before).max()))
    if not gap <= FOLD_BOUND[config.dtype]:
        raise ValueError(f"The exported weights give other logits: relative difference {gap:.2e}. Load with --dtype=float32 to export.")
