"""A tuned model as others read it: a Hugging Face directory, or a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from tuning import build
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch
from tuning.hub import adapters, checkpoint, tokenizer

if TYPE_CHECKING:
    from tuning.api import LoadedModel

FOLD_BOUND = 1e-3  # largest difference of a logit, relative to the largest logit, that rounding explains (float32: about 1e-6)


def export(model: LoadedModel, directory: Path, format: str, merge: bool) -> Path:
    """Writes `directory`. ValueError where the format cannot hold the model, or where merging changes its outputs."""
    directory.mkdir(parents=True, exist_ok=True)
    adapted = any("/adapter/" in name for name in tree.flatten(model.params))
    if format == "peft":
        if model.method["name"] != "lora":
            raise ValueError(f"--format=peft writes an adapter, and this model was tuned by {model.method['name']!r}. Use --format=hf.")
        return _peft(model, directory)
    if format != "hf":
        raise ValueError(f"--format={format!r} is not one of hf, peft.")
    if adapted and not merge:
        raise ValueError("--format=hf holds no adapter: add --merge to fold it into the weights, or use --format=peft.")
    return _hf(model, directory)


def _peft(model: LoadedModel, directory: Path) -> Path:
    leaves = {n: meshes.gather(x) for n, x in tree.flatten(model.params).items() if "/adapter/" in n or n in build.ADDED}
    source, method = model.model.source, model.method
    adapters.write(
        directory, leaves, source.config, rank=method["rank"], alpha=method["alpha"], dropout=method["dropout"],
        rank_stabilized=method["rank_stabilized"], base_model=source.path,
    )  # fmt: skip
    if source.tokenizer is not None:
        tokenizer.save(source.tokenizer, directory)
    return directory


def _hf(model: LoadedModel, directory: Path) -> Path:
    m, source = model.model, model.model.source
    params = jax.jit(m.method.fold)(model.params)
    base = build.model(source, build.METHODS["full"](build.outline(source)), m.mesh)
    params = _same_segments(params, base)
    _compare(model, base, params)
    checkpoint.save(directory, params, source.config, source.published, tokenizer=source.tokenizer, source=source.directory)
    return directory


def _same_segments(params, base: build.Model):
    """Joins the segments of a stack that the method had cut."""
    leaves = tree.flatten(params)
    pieces: dict[str, list] = {}
    for name in sorted(leaves, key=lambda n: (build.layer_range(n) or (0, 0))[0]):
        parts = name.split("/")
        whole = "/".join(["blocks", f"0-{base.source.config.layers - 1}", *parts[2:]]) if build.layer_range(name) else name
        pieces.setdefault(whole, []).append(leaves[name])
    return tree.unflatten({n: xs[0] if len(xs) == 1 else jnp.concatenate(xs) for n, xs in pieces.items()})


def _compare(model: LoadedModel, base: build.Model, params) -> None:
    """The exported weights must give the logits of the model they came from."""
    tokens = np.random.default_rng(0).integers(0, base.source.config.vocabulary, (1, min(32, base.source.config.max_length)))
    before = np.asarray(model.logits(tokens))
    ones = jnp.ones(tokens.shape, jnp.int32)
    ids = jnp.asarray(tokens, jnp.int32)

    def forward(params):
        hidden, head, _ = base.network.apply(params, Batch(ids, ids, ones, ones, jnp.cumsum(ones, 1) - 1))
        return head(hidden)

    with jax.set_mesh(base.mesh):
        after = np.asarray(jax.jit(forward)(params))
    gap = float(np.abs(after - before).max() / max(1.0, np.abs(before).max()))
    bound = FOLD_BOUND if base.source.config.dtype == "float32" else 0.1
    if not gap <= bound:
        raise ValueError(f"The exported weights give other logits: relative difference {gap:.2e}, allowed {bound:.0e}. Export in --dtype=float32.")
