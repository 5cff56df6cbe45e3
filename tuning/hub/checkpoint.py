"""Whole networks from and to published checkpoints: parameters out of safetensors, and a folder that transformers loads."""

from __future__ import annotations

import logging
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
from tuning.hub import families, files, known, names, slices, tokenizer
from tuning.hub.family import Config
from tuning.hub.files import Tensors
from tuning.hub.names import Place, Table

log = logging.getLogger(__name__)

READABLE = tuple(np.dtype(files.DTYPES[code]) for code in ("F64", "F32", "F16", "BF16"))
WRITABLE = ("float32", "bfloat16", "float16")


def read_config(directory: Path) -> dict[str, Any]:
    """The folder's config.json. ValueError if there is none."""
    raw = _of_text(_config(directory), directory)
    found = families.FAMILIES.get(raw.get("model_type", ""))
    return found.untie(raw) if found is not None and found.untie is not None and _has_own_head(directory, raw) else raw


def describe(path: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a folder or a hub id without its weights; of those that are known, without asking the hub. ValueError as above."""
    raw = known.config(path) if revision is None and not Path(path).is_dir() else None
    return dict(raw) if raw else _of_text(_config(files.resolve(path, revision, ["config.json"])), path)


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: it is not a published checkpoint.")
    return files.read_json(directory / "config.json")


def _of_text(raw: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    if raw.get("model_type") not in families.INSIDE:
        return dict(raw)
    log.warning("%s reads more than text. Its text model alone is loaded, and exported.", where)
    return families.INSIDE[raw["model_type"]](raw)


def _has_own_head(directory: Path, raw: Mapping[str, Any]) -> bool:
    """Whether the file has an output over the vocabulary that is not the embedding."""
    tensors, named = opened(directory, raw), {row.leaf: row.tensor for row in families.table(raw)}
    head, embedding = named.get("head/kernel", ""), named["embed/table"]
    return head in tensors and embedding in tensors and not _same(tensors, head, embedding)


def load(
    directory: Path,
    abstract: Tree,
    shardings: Tree,
    dtype_of: Callable[[str], Any],
    raw: Mapping[str, Any],
    wanted: Callable[[str], bool] = lambda name: True,
    store: Callable[[str], slices.Store | None] = lambda name: None,
) -> Tree:
    """The parameters of a checkpoint, each leaf read straight into its shards: this process reads only the slices it keeps.

    abstract   nested dict of ShapeDtypeStructs (only shapes count), without what no checkpoint has: adapters, the rows of added tokens, a
               head that is new
    shardings  nested dict with a sharding for each leaf of `abstract`
    dtype_of   the dtype to keep a leaf in, from its name
    raw        its config.json
    wanted     whether the leaf of this name is read; all are checked
    store      what to keep of the leaf of this name, as slices.read has it

    ValueError that lists all tensors that are missing, unexpected or of another shape.
    """
    want, where = tree.flatten(abstract), tree.flatten(shardings)
    if extra := [name for name in want if "/adapter/" in name or name in names.ADDED]:
        raise ValueError(f"A published checkpoint has no {tree.listing(extra)}; load the base without them and add them after.")
    table = families.table(raw)
    places = {name: names.place(name, leaf.shape, table) for name, leaf in want.items()}
    tensors = opened(directory, raw)
    _check(tensors, places, want, raw)
    chosen = [name for name in want if wanted(name)]
    return tree.unflatten({n: slices.read(tensors, places[n], want[n].shape, where[n], np.dtype(dtype_of(n)), store(n)) for n in chosen})


def opened(directory: Path, raw: Mapping[str, Any]) -> Tensors:
    """The checkpoint's tensors, under the names of its family's table."""
    tensors = Tensors(directory)
    found, patterns = families.family(raw), [row.tensor for row in families.table(raw)]
    numbers = re.compile(r"(?<=\.)\d+(?=\.)")
    layers = {int(n) for name in tensors for n in numbers.findall(name)}
    rows = [p.format(layer=i, expert=0) for p in patterns for i in (layers if "{layer}" in p else [0]) if "{expert}" not in p]
    tensors.rename(names.respell([*rows, *found.aliases], tensors, found.prefix, found.within))
    return tensors


def _check(tensors: Tensors, places: Mapping[str, Place], want: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    found = families.family(raw)
    shapes = {t: names.file_shape(want[name].shape, place) for name, place in places.items() for t in place.tensors}
    dtypes = {name: str(tensors.dtype(name)) for name in shapes if name in tensors and tensors.dtype(name) not in READABLE}
    if dtypes:
        raise ValueError(
            f"{tensors.directory} holds quantised or whole-number weights, which are not read: {tree.listing(map(str, dtypes.items()))}."
        )
    spare = {name for name in tensors if name not in shapes and not (found.ignored and re.search(found.ignored, name))}
    spare -= _repeated(tensors, spare, want, raw)
    others = {row.tensor for form in found.forms.values() for row in form.table}
    others |= set(names.respell(others, spare, found.prefix))
    if heads := sorted(spare & others):
        log.warning(
            "%s: %s belong to another head than %s and are left out.", tensors.directory, tree.listing(heads), raw.get("architectures")
        )
    spare -= others
    wrong = [f"{n} {tensors.shape(n)}, expected {shape}" for n, shape in shapes.items() if n in tensors and tensors.shape(n) != shape]
    kinds = {"missing": [n for n in shapes if n not in tensors], "unexpected": sorted(spare), "wrong shape": wrong}
    if any(kinds.values()):
        said = "; ".join(f"{kind} ({len(found)}): {tree.listing(found)}" for kind, found in kinds.items() if found)
        raise ValueError(f"The tensors of {tensors.directory} are not what its config.json describes. {said}.")


def _repeated(tensors: Tensors, spare: set[str], want: Mapping[str, Any], raw: Mapping[str, Any]) -> set[str]:
    """The spare tensors that only repeat another. ValueError for one that differs from what it should repeat."""
    named = {row.leaf: row.tensor for row in families.table(raw)}
    aliases = dict(families.family(raw).aliases)
    if "head/kernel" in named and "head/kernel" not in want:
        aliases[named["head/kernel"]] = named["embed/table"]
    found = {alias: original for alias, original in aliases.items() if alias in spare and original in tensors}
    for alias, original in found.items():
        if not _same(tensors, alias, original):
            tied = "config.json says tie_word_embeddings=true, but " if alias == named.get("head/kernel") else ""
            raise ValueError(
                f"{tied}{alias} differs from {original} in {tensors.directory}. "
                f"{'Set tie_word_embeddings to false in config.json to keep both, or r' if tied else 'R'}emove the one that is wrong."
            )
    return set(found)


def _same(tensors: Tensors, one: str, two: str, rows: int = 4096) -> bool:
    """Whether two tensors hold the same values; compared a block of rows at a time."""
    if tensors.shape(one) != tensors.shape(two):
        return False
    blocks = (slice(i, i + rows) for i in range(0, tensors.shape(one)[0], rows))
    return all(np.array_equal(tensors.read(one, (block,)), tensors.read(two, (block,))) for block in blocks)


def save(
    directory: str | os.PathLike,
    params: Tree,
    config: Config,
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
    if config.head.output == "vocabulary" and ("head/kernel" in leaves) == config.tied:
        raise ValueError(f"config.tied={config.tied}, but there is {'a' if config.tied else 'no'} leaf head/kernel.")
    rows = _rows(config, leaves)
    plain = config.replace(vocab_size=rows, added=(0, 0))
    ids = {key: None if tokens is None else getattr(tokens, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    raw = families.config_to(plain, original, dtype=dtype, **ids)
    exported = _tensors(leaves, config, families.table(raw), np.dtype(jnp.dtype(dtype)))
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


def _rows(config: Config, leaves: Mapping[str, Any]) -> int:
    """Rows of the exported embedding. ValueError if the rows of added tokens are not where the config says."""
    if ("embed/added" in leaves) != bool(config.added[1]):
        raise ValueError(f"config.added={config.added}, but there is {'no' if config.added[1] else 'a'} leaf embed/added.")
    return config.vocabulary


def _tensors(leaves: Mapping[str, Any], config: Config, table: Table, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the published tensors; a stacked leaf is gathered one layer at a time."""
    first, count = config.added
    added = {kind: leaves[leaf] for leaf, kind in names.ADDED.items() if leaf in leaves}
    for leaf in [name for name in leaves if name not in names.ADDED]:
        place = names.place(leaf, leaves[leaf].shape, table)
        for index, name in zip(np.ndindex(*place.lead), place.tensors, strict=True):
            whole = mesh.gather(_take(leaves[leaf], index) if index else leaves[leaf])
            values = whole.T if place.transposed else whole
            if leaf in added:
                values = np.concatenate([values[:first], mesh.gather(added[leaf]), values[first + count :]])
            elif leaf == "head/bias" and count and config.head.output == "vocabulary":  # added tokens have none
                values = np.concatenate([values[:first], np.zeros(count, values.dtype), values[first + count :]])
            yield name, _cast(name, values, dtype)


@jax.jit
def _take(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        cast = np.ascontiguousarray(values.astype(dtype))
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
        raise ValueError(f"{name} has values beyond float16's largest, 65504. Export in bfloat16 or float32.")
    return cast
