"""LoRA adapters as PEFT directories: adapter_config.json and adapter_model.safetensors (the formats of peft 0.21).

PEFT loads a file whose names are wrong as if it were empty, so nothing is taken on trust here: a key that cannot be honoured, a tensor
that is missing or left over, a shape that does not fit, each is a ValueError.

Shapes: L layers of a segment, D input width, F output width, R rank, N added tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tuning.core import mesh, tree
from tuning.core.types import Tree
from tuning.hub import files, names
from tuning.hub.names import Table

CONFIG, STEM, PREFIX = "adapter_config.json", "adapter_model", "base_model.model."
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}  # [D, R] and [R, F] here; transposed in the file
ROWS = "token_adapter.trainable_tokens_delta"  # [N, D], the rows themselves and not differences

# Keys that change the result, and the values with which they do not.
NEUTRAL: dict[str, tuple] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change the base's weights too
}
# Keys that say nothing about the result, or that are read below.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "trainable_token_indices")
INERT = (
    "auto_mapping",
    "fan_in_fan_out",  # whether the base holds [in, out]: PEFT itself goes by the layer's class
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "layers_pattern",
)


def write(
    directory: Path,
    leaves: Tree,
    table: Table,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    layers: int,
    added: tuple[int, int] = (0, 0),
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Writes the directory that `PeftModel.from_pretrained` reads, and reads it back to see that it holds the same.

    leaves      the adapters, `blocks/0-15/attn/q/adapter/a` [L, D, R] and `.../b` [L, R, F]; also `embed/added`, `head/added` [N, D]
    layers      of the network; every one must have the same adapters
    added       (first id, N) of the added tokens. PEFT needs a base with that many rows: `model.resize_token_embeddings(first + N)`
    base_model  the base's hub id, or its folder; revision, its version on the hub

    In a run of several processes every one must call it; the first one writes.
    """
    flat = {name: value if isinstance(value, np.ndarray) else mesh.gather(value) for name, value in tree.flatten(leaves).items()}
    tensors = dict(_files(flat, table))
    modules = _modules(tensors, layers, table)
    settings = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model, "revision": revision, "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": dropout, "use_rslora": rank_stabilized,
        "target_modules": modules, "bias": "none", "use_dora": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
        "fan_in_fan_out": not all(row.transposed for row in _linear(table)),
    }  # fmt: skip
    if ranks := {value.shape[0] for name, value in tensors.items() if name.endswith(PARTS["a"])} - {rank}:
        raise ValueError(f"The adapters have rank {sorted(ranks)}, not rank={rank}.")
    if added[1]:
        settings["trainable_token_indices"] = _token_indices(flat, tensors, added, table)
    if jax.process_index() != 0:
        return directory
    files.write(directory, tensors.items(), stem=STEM)
    files.write_json(directory / CONFIG, settings)
    again = tree.flatten(read(directory, tree.unflatten(flat), table))
    if bad := [name for name, value in flat.items() if not np.array_equal(again[name], value, equal_nan=True)]:
        raise ValueError(f"{directory}: read back, {tree.listing(bad)} differ from what was written.")
    return directory


def settings(directory: Path, table: Table) -> dict[str, Any]:
    """What the directory says about its method: rank, alpha, dropout, rank_stabilized, targets (roles: `attn/q`), layers, added.

    layers is one more than the last layer with adapters; added is (first id, count) of trained token rows, (0, 0) without. ValueError
    naming the key for whatever a LoRA of this project cannot honour, and for tensors that do not fit target_modules.
    """
    raw = read_config(directory)
    found = _open(directory)
    if strange := [name for name in found if _module(name) is None]:
        raise ValueError(
            f"{directory} has tensors that are no part of a LoRA on linear layers: {tree.listing(strange)}. Names have the form "
            f"{PREFIX}model.layers.0.self_attn.q_proj.{PARTS['a']}; PEFT would load others as if they were not there."
        )
    modules = {module for name in found if (module := _module(name)) and not name.endswith(ROWS)}
    roles, layers = _roles(modules, table)
    where = f"{directory / CONFIG}: target_modules={json.dumps(raw.get('target_modules'))}"
    for role, pattern, _ in _linear(table):
        for module in (pattern.format(layer=i) for i in range(layers)):
            if _targeted(module, raw.get("target_modules")) != (module in modules):
                has = "tensors, and is not named by it" if module in modules else "no tensors, and is named by it"
                raise ValueError(f"{where}: {module} ({role}) has {has}.")
    return {
        "rank": raw.get("r", 8),
        "alpha": float(raw.get("lora_alpha", 8)),  # PEFT's own defaults
        "dropout": float(raw.get("lora_dropout", 0.0)),
        "rank_stabilized": bool(raw.get("use_rslora", False)),
        "targets": roles,
        "layers": layers,
        "added": _added(raw.get("trainable_token_indices"), directory),
    }


def read(directory: Path, abstract: Tree, table: Table) -> Tree:
    """The leaves of `abstract` (adapters and rows of added tokens), as numpy arrays in its shapes and dtypes.

    ValueError that lists missing, left-over and misshaped tensors.
    """
    read_config(directory)
    tensors, want = _open(directory), tree.flatten(abstract)
    expected: dict[str, tuple[int, ...]] = {}
    values: dict[str, np.ndarray] = {}
    for leaf, target in want.items():
        place = _place(leaf, target.shape, table)
        shape = names.file_shape(target.shape, place)
        expected.update(dict.fromkeys(place.tensors, shape))
        if all(name in tensors and tensors.shape(name) == shape for name in place.tensors):
            parts = [tensors.read(name).T if place.transposed else tensors.read(name) for name in place.tensors]
            values[leaf] = np.stack(parts).reshape(target.shape).astype(target.dtype)
    wrong = [f"{n} {tensors.shape(n)}, expected {shape}" for n, shape in expected.items() if n in tensors and tensors.shape(n) != shape]
    kinds = {
        "missing": [n for n in expected if n not in tensors],
        "unmatched": [n for n in tensors if n not in expected],
        "wrong shape": wrong,
    }
    if any(kinds.values()):
        said = "; ".join(f"{kind} ({len(found)}): {tree.listing(found)}" for kind, found in kinds.items() if found)
        raise ValueError(f"The adapter in {directory} does not fit this network. {said}.")
    return tree.unflatten(values)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. ValueError that names the first key which asks for something else than plain LoRA."""
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is not a PEFT adapter.")
    raw = files.read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={raw.get('peft_type')!r} is not supported; only LORA is.")
    for key, value in raw.items():
        if key in READ or key in INERT:
            continue
        neutral = value in NEUTRAL[key] if key in NEUTRAL else value is None or value is False or value in ({}, [], "")
        if not neutral:
            raise ValueError(
                f"{path}: {key}={value!r} is not supported: only plain LoRA is read, and to leave it out would change the result."
            )
    rank = raw.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r={rank!r} must be a positive whole number.")
    return raw


def _open(directory: Path) -> files.Tensors:
    return files.Tensors(directory, STEM)


def _place(leaf: str, shape: Sequence[int], table: Table) -> names.Place:
    """Where an adapter's leaf stands in the file."""
    if leaf in names.ADDED:
        module = names.place(names.ADDED[leaf], shape, table).tensors[0].removesuffix("weight")
        return names.Place((f"{PREFIX}{module}{ROWS}",), (), transposed=False)
    head, _, part = leaf.rpartition("/adapter/")
    if part not in PARTS:
        raise ValueError(f"The leaf {leaf} is not LoRA's: a PEFT adapter holds .../adapter/a and .../adapter/b.")
    base = names.place(f"{head}/kernel", shape, table)
    if not base.tensors[0].endswith(".weight"):
        raise ValueError(f"PEFT has no LoRA for {base.tensors[0]}: use --format=hf --merge.")
    tensors = tuple(f"{PREFIX}{name.removesuffix('weight')}{PARTS[part]}" for name in base.tensors)
    return names.Place(tensors, base.lead, transposed=True)


def _files(flat: Mapping[str, np.ndarray], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of the file's tensors."""
    for leaf, value in flat.items():
        place = _place(leaf, value.shape, table)
        for index, name in zip(np.ndindex(*place.lead), place.tensors, strict=True):
            one = value[index]
            yield name, np.ascontiguousarray(one.T if place.transposed else one)


def _module(tensor: str) -> str | None:
    """`model.layers.0.self_attn.q_proj` of one of its tensors; None for a name that is not PEFT's."""
    for ending in (*PARTS.values(), ROWS):
        if tensor.startswith(PREFIX) and tensor.endswith(f".{ending}"):
            return tensor[len(PREFIX) : -len(ending) - 1]
    return None


def _linear(table: Table, within: str = "{layer}") -> list[names.Row]:
    """(role, module pattern, transposed) of the projections inside the layers, without those of experts, which offer no sites."""
    rows = [row for row in table if row.leaf.endswith("/kernel") and within in row.tensor and "{expert}" not in row.tensor]
    return [names.Row(row.leaf.removesuffix("/kernel"), row.tensor.removesuffix(".weight"), row.transposed) for row in rows]


def _pattern(module: str) -> str:
    """A regular expression for the module in any layer."""
    return re.escape(module).replace(re.escape("{layer}"), r"(\d+)")


def _modules(tensors: Mapping[str, Any], layers: int, table: Table) -> list[str] | str:
    """target_modules: the last parts of the adapted modules' names, or, where another module's name ends like that too, a regular
    expression for the whole names. ValueError unless all layers have them."""
    paths = {str(_module(name)) for name in tensors if not name.endswith(ROWS)}
    every = [row.tensor for row in _linear(table, "")]
    counts = {module: sum(re.fullmatch(_pattern(module), path) is not None for path in paths) for module in every}
    adapted = [module for module in every if counts[module]]
    if short := {module: counts[module] for module in adapted if counts[module] != layers}:
        raise ValueError(f"An adapter for PEFT must be in all {layers} layers; layers that have it: {short}.")
    if not adapted:
        raise ValueError("There is no LoRA leaf (.../adapter/a) to write.")
    last = {module: module.rsplit(".", 1)[-1] for module in every}
    suffixes = {last[module] for module in adapted}
    apart = all(counts[module] or last[module] not in suffixes for module in every)
    return sorted(suffixes) if apart else "|".join(map(_pattern, adapted))


def _roles(modules: set[str], table: Table) -> tuple[tuple[str, ...], int]:
    """(roles that are adapted, number of layers). ValueError for a module that the network does not have."""
    roles, layers, left = [], 0, set(modules)
    for role, pattern, _ in _linear(table):
        hits = {module: int(hit[1]) for module in modules if (hit := re.fullmatch(_pattern(pattern), module))}
        left -= hits.keys()
        if hits:
            roles.append(role)
            layers = max(layers, 1 + max(hits.values()))
    if left:
        raise ValueError(f"Adapters on modules that are not projections of this network's layers: {tree.listing(sorted(left))}.")
    if not roles:
        raise ValueError(f"There is no adapter in the file: no tensor ends in {PARTS['a']}.")
    return tuple(roles), layers


def _targeted(module: str, target: Any) -> bool:
    """PEFT's rule: a list holds whole last parts of names; a string is a pattern for the whole name, or `all-linear`."""
    if target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target or ())


def _token_indices(flat: Mapping[str, Any], tensors: Mapping[str, Any], added: tuple[int, int], table: Table) -> dict[str, list[int]]:
    """trainable_token_indices: the ids whose rows are in the file, for the embedding and, if it is not tied, for the head."""
    for leaf in names.ADDED:
        if leaf in flat and flat[leaf].shape[0] != added[1]:
            raise ValueError(f"{leaf} has {flat[leaf].shape[0]} rows, and added={added} says {added[1]}.")
    modules = [str(_module(name)) for name in tensors if name.endswith(ROWS)]
    return {module.rsplit(".", 1)[-1]: list(range(added[0], added[0] + added[1])) for module in modules}


def _added(said: Mapping[str, Sequence[int]] | Sequence[int] | None, directory: Path) -> tuple[int, int]:
    """(first, count) of trainable_token_indices, which must be consecutive and the same for the embedding and the head."""
    if not said:
        return 0, 0
    rows = {tuple(ids) for ids in (said.values() if isinstance(said, Mapping) else [said])}
    ids = sorted(rows)[0]
    if len(rows) > 1 or ids != tuple(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"{directory / CONFIG}: trainable_token_indices={said!r} must be one range of consecutive ids.")
    return ids[0], len(ids)
