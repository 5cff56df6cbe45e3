"""Whole networks from and to published checkpoints: parameters out of safetensors, and a folder that transformers loads."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuning.core import mesh, tree
from tuning.core.types import Tree
from tuning.hub import families, files, names, tokenizer
from tuning.hub.files import Tensors
from tuning.hub.names import Place, Table
from tuning.models.decoder import DecoderConfig

BUFFERS = r"(^|\.)rotary_emb\.inv_freq$"  # constants that old checkpoints stored
READABLE = tuple(np.dtype(files.DTYPES[code]) for code in ("F64", "F32", "F16", "BF16"))
WRITABLE = ("float32", "bfloat16", "float16")


def read_config(directory: Path) -> dict[str, Any]:
    """The folder's config.json. ValueError if there is none."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: it is not a published checkpoint.")
    return files.read_json(directory / "config.json")


def load(
    directory: Path,
    abstract: Tree,
    shardings: Tree,
    dtype_of: Callable[[str], Any],
    table: Table,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Tree:
    """The parameters of a checkpoint, each leaf read straight into its shards: this process reads only the slices it keeps.

    abstract   nested dict of ShapeDtypeStructs (only shapes count), without what no checkpoint has: adapters and the rows of added tokens
    shardings  nested dict with a sharding for each leaf of `abstract`
    dtype_of   the dtype to keep a leaf in, from its name
    table      the family's table of names
    wanted     whether the leaf of this name is read; all are checked

    ValueError that lists all tensors that are missing, unexpected or of another shape.
    """
    want, where = tree.flatten(abstract), tree.flatten(shardings)
    if extra := [name for name in want if "/adapter/" in name or name in names.ADDED]:
        raise ValueError(f"A published checkpoint has no {tree.listing(extra)}; load the base without them and add them after.")
    tensors = Tensors(directory)
    places = {name: names.place(name, table) for name in want}
    _check(tensors, places, want, table)
    return tree.unflatten(
        {n: _leaf(tensors, places[n], leaf.shape, where[n], np.dtype(dtype_of(n))) for n, leaf in want.items() if wanted(n)}
    )


def _check(tensors: Tensors, places: Mapping[str, Place], want: Mapping[str, Any], table: Table) -> None:
    shapes = {t: names.file_shape(want[name].shape, place) for name, place in places.items() for t in place.tensors}
    dtypes = {name: str(tensors.dtype(name)) for name in shapes if name in tensors and tensors.dtype(name) not in READABLE}
    if dtypes:
        raise ValueError(
            f"{tensors.directory} holds quantised or whole-number weights, which are not read: {tree.listing(map(str, dtypes.items()))}."
        )
    spare = {name for name in tensors if name not in shapes and not re.search(BUFFERS, name)}
    head, embed = (names.place(leaf, table).tensors[0] for leaf in ("head/kernel", "embed/table"))
    if "head/kernel" not in want and head in spare:
        if embed in tensors and not _same(tensors, head, embed):
            raise ValueError(
                f"config.json says tie_word_embeddings=true, but {head} differs from {embed} in {tensors.directory}. "
                "Set tie_word_embeddings to false in config.json to keep both, or remove the one that is wrong."
            )
        spare.discard(head)
    wrong = [f"{n} {tensors.shape(n)}, expected {shape}" for n, shape in shapes.items() if n in tensors and tensors.shape(n) != shape]
    kinds = {"missing": [n for n in shapes if n not in tensors], "unexpected": sorted(spare), "wrong shape": wrong}
    if any(kinds.values()):
        said = "; ".join(f"{kind} ({len(found)}): {tree.listing(found)}" for kind, found in kinds.items() if found)
        raise ValueError(f"The tensors of {tensors.directory} are not what its config.json describes. {said}.")


def _same(tensors: Tensors, one: str, two: str, rows: int = 4096) -> bool:
    """Whether two matrices hold the same values; compared a block of rows at a time."""
    if tensors.shape(one) != tensors.shape(two):
        return False
    blocks = (slice(i, i + rows) for i in range(0, tensors.shape(one)[0], rows))
    return all(np.array_equal(tensors.read(one, (block,)), tensors.read(two, (block,))) for block in blocks)


def _leaf(tensors: Tensors, place: Place, shape: tuple[int, ...], sharding: Any, dtype: np.dtype) -> jax.Array:
    """One leaf, born sharded. Devices that hold the same slice share one reading of it."""
    done: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if spans not in done:
            done[spans] = _slice(tensors, place, [slice(*span) for span in spans], dtype)
        return done[spans]

    return jax.make_array_from_callback(shape, sharding, read)


def _slice(tensors: Tensors, place: Place, index: list[slice], dtype: np.dtype) -> np.ndarray:
    """The values of a leaf at `index`, in our layout and dtype."""

    def one(name: str, part: list[slice]) -> np.ndarray:
        return tensors.read(name, part[::-1]).T if place.transposed else tensors.read(name, part)

    if not place.stacked:
        return one(place.tensors[0], index).astype(dtype)
    out = np.empty([part.stop - part.start for part in index], dtype)
    for row, name in enumerate(place.tensors[index[0]]):
        out[row] = one(name, index[1:]).astype(dtype)
    return out


def save(
    directory: str | os.PathLike,
    params: Tree,
    config: DecoderConfig,
    *,
    original: Mapping[str, Any] | None = None,
    tokens: Any = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = files.SHARD_BYTES,
) -> Path:
    """Writes a folder that transformers loads: config.json, generation_config.json, safetensors and the tokenizer's files.

    params      folded, without adapters; rows of added tokens (`embed/added`, `head/added`) are put in their places
    original    the config.json that the network came with, whose keys are kept; None for one that was made here
    tokens      the tokenizer
    generation  the content of generation_config.json; by default the ids of the special tokens
    dtype       of the file's tensors: float32, bfloat16 or float16
    shard_bytes size of a file from which on another is begun

    Every process of a run must call it, because they gather each tensor together; the first one writes.
    """
    folder, leaves = Path(directory), tree.flatten(params)
    if dtype not in WRITABLE:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(WRITABLE)}.")
    if adapters := [name for name in leaves if "/adapter/" in name]:
        raise ValueError(f"These parameters still have adapters ({tree.listing(adapters, 3)}); fold them first.")
    if ("head/kernel" in leaves) == config.tied:
        raise ValueError(f"config.tied={config.tied}, but there is {'a' if config.tied else 'no'} leaf head/kernel.")
    rows = _rows(config, leaves)
    plain = dataclasses.replace(config, vocab_size=rows, added=(0, 0))
    ids = {key: None if tokens is None else getattr(tokens, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    raw = families.config_to(plain, original, dtype=dtype, **ids)
    exported = _tensors(leaves, config, families.family(raw).table, np.dtype(jnp.dtype(dtype)))
    if jax.process_index() != 0:
        for _ in exported:
            pass
        return folder
    files.write(folder, exported, shard_bytes)
    files.write_json(folder / "config.json", raw)
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    files.write_json(folder / "generation_config.json", special if generation is None else dict(generation))
    if tokens is not None:
        tokenizer.save(tokens, folder)
    return folder


def _rows(config: DecoderConfig, leaves: Mapping[str, Any]) -> int:
    """Rows of the exported embedding. ValueError if the rows of added tokens are not where the config says."""
    if ("embed/added" in leaves) != bool(config.added[1]):
        raise ValueError(f"config.added={config.added}, but there is {'no' if config.added[1] else 'a'} leaf embed/added.")
    return config.vocabulary


def _tensors(leaves: Mapping[str, Any], config: DecoderConfig, table: Table, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the published tensors; a stacked leaf is gathered one layer at a time."""
    first, count = config.added
    added = {kind: leaves[leaf] for leaf, kind in names.ADDED.items() if leaf in leaves}
    for leaf in [name for name in leaves if name not in names.ADDED]:
        place = names.place(leaf, table)
        for layer, name in enumerate(place.tensors):
            whole = mesh.gather(_take(leaves[leaf], layer) if place.stacked else leaves[leaf])
            values = whole.T if place.transposed else whole
            if leaf in added:
                values = np.concatenate([values[:first], mesh.gather(added[leaf]), values[first + count :]])
            yield name, _cast(name, values, dtype)


@jax.jit
def _take(leaf: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        cast = np.ascontiguousarray(values.astype(dtype))
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
        raise ValueError(f"{name} has values beyond float16's largest, 65504. Export in bfloat16 or float32.")
    return cast
