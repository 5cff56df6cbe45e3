"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors (the formats of peft 0.21).

PEFT loads a file whose names are wrong as if it were empty, so nothing is taken on trust here: a key that cannot be honoured, a tensor
that is missing or left over, a shape that does not fit, each is a ValueError. What tells the methods apart stands in peft_kinds.

Shapes: N added tokens, D width, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tuning.core import mesh, tree
from tuning.core.types import Tree
from tuning.hub import files, names, peft_norms, peft_saved, peft_targets, peft_tied
from tuning.hub.names import Table
from tuning.hub.peft_kinds import BASE, CONFIG, KINDS, PREFIX, Kind, Leaves, whole
from tuning.hub.peft_modules import ends, targeted
from tuning.methods import kernels
from tuning.nn.sites import Outline

STEM, PACKED = "adapter_model", "prompt_embeddings"
ROWS = "token_adapter.trainable_tokens_delta"  # [N, D], the rows themselves and not differences

TASKS = {"SEQ_CLS": "sequence_classification", "TOKEN_CLS": "token_classification", "QUESTION_ANS": "question_answering"}
# Modules that PEFT saves under these tasks without being told.
SAVED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
SPEAKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
# Keys that say nothing about the result. fan_in_fan_out, whether the base holds [in, out], PEFT corrects by the layer's class.
INERT = ("auto_mapping", "fan_in_fan_out", "base_model_name_or_path", "revision", "inference_mode", "peft_version")


class Settings(NamedTuple):
    """What a directory says.

    method  the config of the method that its values belong to, with its name
    added   (first id, N) of trained rows of added tokens; (0, 0) without
    saved   leaves of the base, or of a new head, that it brings along: they learned beside the adapter
    """

    method: dict[str, Any]
    added: tuple[int, int]
    saved: tuple[str, ...]


def write(
    directory: Path,
    leaves: Tree,
    table: Table,
    outline: Outline,
    method: Mapping[str, Any],
    *,
    added: tuple[int, int] = (0, 0),
    copies: Sequence[str] = (),
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    heads: int | None = None,
) -> Path:
    """Writes the directory that `PeftModel.from_pretrained` reads, and reads it back to see that it holds the same.

    leaves      the adapters, `blocks/0-15/attn/q/adapter/a`; the rows of added tokens, `embed/added` and `head/added` [N, D]; what else
                learned, of the base or of a new head: all leaves of a module
    outline     the network's places; all layers that have an adapted place must have the adapter
    method      the config of the method that they belong to
    added       (first id, N) of the added tokens. PEFT needs a base with that many rows: `model.resize_token_embeddings(first + N)`
    copies      modules that share the embedding's weights
    base_model  the base's hub id, or its folder; revision, its version on the hub
    heads       of attention: PEFT asks for them with a prompt, where it cannot find them in the base's config, and does nothing with them

    In a run of several processes every one must call it; the first one writes.
    """
    flat = {name: value if isinstance(value, np.ndarray) else mesh.gather(value) for name, value in tree.flatten(leaves).items()}
    peft_type = type_of(method["name"])
    kind = KINDS[peft_type]
    method, flat = kind.plain(method, flat)
    peft_tied.check_writable(kind, flat, table, copies)
    task_type = (task_type or "FEATURE_EXTRACTION") if kind.pack else task_type
    sides = 2 if task_type == "SEQ_2_SEQ_LM" else 1
    tensors = _tensors(kind, flat, table, sides, copies)
    config = {
        "peft_type": peft_type, "task_type": task_type, "base_model_name_or_path": base_model, "revision": revision,
        "inference_mode": True, **kind.constant, **{key: whole(method[ours]) for key, (ours, _) in kind.keys.items() if ours in method},
    }  # fmt: skip
    if kind.norms:
        config["target_modules"], copied = peft_norms.tell(flat, outline.leaves, table)
        tensors = {PREFIX + copied.get(bare := name.removeprefix(PREFIX), bare): x for name, x in tensors.items()}
    if beside := [name for name in _own(flat, "base") if not (kind.norms and peft_norms.is_norm(name))]:
        config["modules_to_save"] = _modules_to_save(kind, beside, tensors, task_type, table, outline)
        config |= {"ensure_weight_tying": True} if copies and "embed/table" in beside and kind.lookups else {}
    if kind.pack:
        config |= {"num_attention_heads": heads, "num_transformer_submodules": sides, **kind.pack.tell(_own(flat, "adapter"))}
    elif not kind.norms:
        common, said = peft_targets.tell(kind, method, _own(flat, "adapter"), table, outline)
        tensors, config = {**tensors, **common}, {**config, **said}
    if added[1]:
        config["trainable_token_indices"] = _token_indices(flat, tensors, added)
    if jax.process_index() != 0:
        return directory
    files.write(directory, tensors.items(), stem=STEM)
    files.write_json(directory / CONFIG, config)
    _read_back(directory, kind, flat, method, table, outline)
    return directory


def _read_back(directory: Path, kind: Kind, flat: Leaves, method: Mapping[str, Any], table: Table, outline: Outline) -> None:
    again = tree.flatten(read(directory, tree.unflatten(flat), table))
    if bad := [name for name, value in flat.items() if not np.array_equal(again[name], value, equal_nan=True)]:
        raise ValueError(f"{directory}: read back, {tree.listing(bad)} differ from what was written.")
    said = settings(directory, table, outline).method
    if bad := [ours for ours, _ in kind.keys.values() if ours in method and said[ours] != method[ours]]:
        raise ValueError(f"{directory}: read back, it says {', '.join(f'{key}={said[key]!r}' for key in bad)}; written was {dict(method)}.")


def head(directory: Path) -> tuple[str, int] | None:
    """(model.head, number of its outputs) of the head that a directory brings along, if it does."""
    task = read_config(directory).get("task_type")
    tensors = files.Tensors(directory, STEM)
    outputs = [n for n in tensors if re.fullmatch(r"base_model\.(model\.)?(score|classifier|classifier\.out_proj|qa_outputs)\.weight", n)]
    return (TASKS[task], tensors.shape(outputs[0])[0]) if task in TASKS and outputs else None


def settings(directory: Path, table: Table, outline: Outline) -> Settings:
    """What a directory says, of a network with this table and these places.

    ValueError naming the key for whatever our methods cannot honour, and for tensors that do not fit target_modules and modules_to_save.
    """
    raw = read_config(directory)
    kind, tensors = _opened(directory, raw)
    modules, rows, saved = _sort(tensors, kind, raw, table, outline.leaves, directory)
    method: dict[str, Any] = {"name": kind.reads_as or kind.method}
    method |= {ours: _value(directory, raw, key, default) for key, (ours, default) in kind.keys.items()}
    if not (kind.pack or kind.norms):
        net = peft_targets.network(kind, outline, table)
        roles = peft_targets.hear(kind, modules, net, raw, directory)
        method |= {**({"targets": roles} if kind.parts else {}), **kind.hear(raw, roles, net)}
        for name, value in zip(kind.common, kind.draw(method, roles, net), strict=True):
            if name in tensors and not np.allclose(tensors.read(name), value, rtol=1e-6, atol=1e-7):
                raise ValueError(
                    f"{directory}: {name} is not what projection_prng_key={method['projection_seed']} gives here, and it is no leaf that "
                    "could be read. Fold the adapter into its base with peft (merge_and_unload)."
                )
        if kind.parts:
            peft_tied.check_encoder(roles, saved, outline, directory)
    if saved:
        patterns = tuple(f"^{re.escape(leaf)}$" for leaf in saved)
        method |= {"leaves": "|".join(patterns)} if kind.norms else {"also": patterns}
    said = raw.get("trainable_token_indices")
    if bool(said) != bool(rows):
        raise ValueError(
            f"{directory / CONFIG}: trainable_token_indices={said!r}, and the file has rows of {tree.listing(rows) or 'none'}."
        )
    return Settings(method, _added(said, directory), saved)


def saved(directory: Path, table: Table, leaves: Iterable[str]) -> tuple[str, ...]:
    """Those of a network's leaves that a directory brings along beside the adapter."""
    raw = read_config(directory)
    base = [name for name in leaves if "/adapter/" not in name]
    kind, tensors = _opened(directory, raw)
    return _sort(tensors, kind, raw, table, base, directory)[2]


def check_base(directory: Path, table: Table, leaves: Iterable[str], of_base: Callable[[str], jax.Array]) -> None:
    """ValueError if a directory holds an embedding or an output, under its adapter there, that is not this base's: `of_base(leaf)`."""
    peft_tied.check_base(directory, files.Tensors(directory, STEM), table, leaves, of_base)


def read(directory: Path, abstract: Tree, table: Table) -> Tree:
    """The leaves of `abstract` (adapters, rows of added tokens, a head), as numpy arrays in its shapes and dtypes.

    ValueError that lists missing, left-over and misshaped tensors.
    """
    raw = read_config(directory)
    (kind, tensors), want = _opened(directory, raw), tree.flatten(abstract)
    blank = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in want.items()}
    sides = raw.get("num_transformer_submodules") or (2 if raw.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    own = _own(blank, "adapter")
    for key, value in kind.pack.tell(own).items() if kind.pack else ():
        if raw.get(key) not in (None, value):
            raise ValueError(f"{directory / CONFIG}: {key}={raw[key]!r}, and it is {value} in this network.")
    copies = peft_tied.copies(kind, tensors, want, table)
    expected = {name: value.shape for name, value in _tensors(kind, blank, table, sides, copies).items()}
    _fits(directory, tensors, expected, kind.common)
    values = kind.pack.read(tensors.read(PACKED), own) if kind.pack else {}
    for leaf, target in want.items():
        if leaf not in values:
            place, part = _place(kind, leaf, target.shape, table)
            back = part.read if part else (lambda x, turn=place.transposed: x.T if turn else x)
            values[leaf] = np.stack([back(tensors.read(name)) for name in place.tensors])
        values[leaf] = values[leaf].reshape(target.shape).astype(target.dtype)
    if copies:
        peft_tied.check_values(directory, tensors, _tensors(kind, values, table, sides, copies), copies)
    return tree.unflatten(values)


def _opened(directory: Path, raw: Mapping[str, Any]) -> tuple[Kind, Any]:
    kind = KINDS[raw["peft_type"]]
    return kind, kind.opened(raw, files.Tensors(directory, STEM))


def _fits(directory: Path, tensors: files.Tensors, expected: Mapping[str, tuple[int, ...]], common: Sequence[str]) -> None:
    wrong = [f"{n} {tensors.shape(n)}, expected {shape}" for n, shape in expected.items() if n in tensors and tensors.shape(n) != shape]
    kinds = {
        "missing": [n for n in expected if n not in tensors],
        "unmatched": [n for n in tensors if n not in (*expected, *common) and BASE not in n],
        "wrong shape": wrong,
    }
    if any(kinds.values()):
        said = "; ".join(f"{what} ({len(found)}): {tree.listing(found)}" for what, found in kinds.items() if found)
        raise ValueError(f"The adapter in {directory} does not fit this network. {said}.")


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. ValueError that names the first key which asks for something that no method of ours does."""
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}: it is not a PEFT adapter.")
    raw = files.read_json(path)
    if raw.get("peft_type") not in KINDS:
        raise ValueError(f"{path}: peft_type={raw.get('peft_type')!r} is not supported; {', '.join(KINDS)} are.")
    kind = KINDS[raw["peft_type"]]
    tasks = (*SPEAKS, *TASKS, *(() if kind.pack else (None,)))  # without a task PEFT ignores a prompt
    neutral = {**kind.neutral, "task_type": tasks}
    for key, value in raw.items():
        if key in ("peft_type", *kind.keys, *kind.said, *kind.inert, *INERT):
            continue
        if not (value in neutral[key] if key in neutral else value is None or value is False or value in ({}, [], "")):
            raise ValueError(
                f"{path}: {key}={value!r} is not supported: {raw['peft_type']} is read without, and that would change the result."
            )
    if raw.get("task_type") not in tasks:
        raise ValueError(f"{path}: task_type={raw.get('task_type')!r} must be one of {', '.join(map(str, tasks))}.")
    return raw


def _value(directory: Path, raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key of adapter_config.json as the type of its default; whole numbers other than -1 are counts."""
    value = raw.get(key, default)
    if type(default) is int and (type(value) is not int or (value < 1 and value != -1) or (value == -1 != default)):
        raise ValueError(f"{directory / CONFIG}: {key}={value!r} must be a positive whole number.")
    return type(default)(value)


def type_of(method: str) -> str:
    """The peft_type of a method. ValueError if PEFT has none that can be written."""
    found = {kind.method: peft_type for peft_type, kind in KINDS.items()}
    if method not in found:
        raise ValueError(
            f"PEFT has no adapter of method {method!r} that can be written; it has those of {', '.join(found)}. Use --format=hf."
        )
    return found[method]


# Leaves and tensors.


def _own(leaves: Leaves, what: str) -> dict[str, Any]:
    """The leaves of the adapter, or those of the base and of a head."""
    return {name: x for name, x in leaves.items() if name not in names.ADDED and ("/adapter/" in name) == (what == "adapter")}


def _tensors(kind: Kind, leaves: Leaves, table: Table, sides: int, copies: Iterable[str]) -> dict[str, np.ndarray]:
    """The file's tensors by name."""
    tensors, own = {}, _own(leaves, "adapter")
    if not own and not kind.norms:
        raise ValueError(f"There is no leaf of an adapter (.../adapter/{next(iter(kind.parts), 'prompt')}) to write.")
    for leaf, value in leaves.items():
        if kind.pack and leaf in own:
            continue
        place, part = _place(kind, leaf, value.shape, table)
        role = leaf.partition("/adapter/")[0]
        for index, name in zip(np.ndindex(*place.lead), place.tensors, strict=True):
            one = part.write(value[index], role) if part else value[index].T if place.transposed else value[index]
            tensors[name] = np.ascontiguousarray(one)
            if part and part.tied:
                tensors |= {f"{PREFIX}{module}.{part.tied}": np.ascontiguousarray(value) for module in copies}
            if leaf == "embed/table":
                tensors |= {f"{PREFIX}{module}.weight": tensors[name] for module in copies}
    return {PACKED: np.ascontiguousarray(kind.pack.write(own, sides)), **tensors} if kind.pack else tensors


def _place(kind: Kind, leaf: str, shape: Sequence[int], table: Table):
    """Where a leaf stands in the file, and which part of the adapter it is, if any."""
    prefix = PREFIX.removesuffix("model.") if kind.pack else PREFIX
    if leaf in names.ADDED:
        if not kind.rows:
            raise ValueError(f"PEFT keeps rows of added tokens ({leaf}) with LoRA alone. Use --format=hf.")
        module = names.place(names.ADDED[leaf], shape, table).tensors[0].removesuffix("weight")
        return names.Place((f"{prefix}{module}{ROWS}",), (), transposed=False), None
    if "/adapter/" not in leaf:
        place = names.place(leaf, shape, table)
        return names.Place(tuple(prefix + name for name in place.tensors), place.lead, place.transposed), None
    module, _, name = leaf.rpartition("/adapter/")
    parts = kind.lookups if module == "embed" else kind.parts
    if name not in parts:
        raise ValueError(f"The leaf {leaf} is not {kind.method}'s, whose adapters hold {', '.join(parts)}.")
    base = names.place(kernels.kernel_of(module), shape[:3], table)
    if not base.tensors[0].endswith(".weight"):
        raise ValueError(f"PEFT has no adapter for {base.tensors[0]}: use --format=hf --merge.")
    if not (base.transposed or kind.conv or module == "embed"):
        raise ValueError(f"PEFT has no {kind.method} for {base.tensors[0]}, which is no nn.Linear there. Use --format=hf --merge.")
    part = parts[name]
    return names.Place(tuple(f"{prefix}{x.removesuffix('weight')}{part.ending}" for x in base.tensors), base.lead, base.transposed), part


def _sort(tensors: files.Tensors, kind: Kind, raw: Mapping[str, Any], table: Table, leaves: Sequence[str], directory: Path):
    """(adapted modules, modules with rows of added tokens, leaves of the base or a head). ValueError for a tensor that is none of these."""
    prefix = PREFIX.removesuffix("model.") if kind.pack else PREFIX
    output = peft_tied.output(leaves, table)
    base = {tensor for leaf in leaves for tensor in peft_saved.published(leaf, table)} | {f"{output}.weight"}
    modules, rows, held, strange = set(), set(), set(), []
    for name in tensors:
        found = _split(name, kind)
        if name.removeprefix(prefix) in base:
            held.add(name.removeprefix(prefix))
        elif found:
            (rows if found[1] == ROWS else modules).add(found[0])
        elif not (kind.pack and name == PACKED) and not (kind.lookups and BASE in name) and name not in kind.common:
            strange.append(name)
    if strange:
        ending = "" if kind.norms or kind.pack else next(iter((kind.parts or kind.lookups).values())).ending
        module = peft_norms.copied("input_layernorm.weight") if kind.norms else f"self_attn.q_proj.{ending}"
        form = PACKED if kind.pack else f"{PREFIX}model.layers.0.{module}"
        raise ValueError(
            f"{directory} has tensors that are no part of a {raw['peft_type']} adapter: {tree.listing(strange)}. Names have the form "
            f"{form}; PEFT would load others as if they were not there."
        )
    task = "" if kind.lookups and not kind.parts else raw.get("task_type") or ""  # PEFT has no modules_to_save with trained rows
    told = (*(raw.get("modules_to_save") or ()), *SAVED.get(task, ()))
    norms = raw.get("target_modules") if kind.norms else ()
    try:
        saved = peft_saved.saved(held, lambda module: ends(module, told) or targeted(module, norms), leaves, table)
    except ValueError as error:
        said = json.dumps({key: raw.get(key) for key in ("modules_to_save", *(["target_modules"] if kind.norms else []))})
        raise ValueError(f"{directory / CONFIG}: {said}: {error}") from None
    peft_tied.check_saved(output, held, saved, raw, directory)
    if task in TASKS and not any(leaf.startswith("head/") for leaf in saved):
        raise ValueError(f"{directory / CONFIG}: task_type={task!r}, and the file has no head of this network.")
    return modules, rows, saved


def _split(tensor: str, kind: Kind) -> tuple[str, str] | None:
    """(`model.layers.0.self_attn.q_proj`, ending) of one of a module's tensors; None for a name that is not this kind's."""
    parts = [*kind.parts.values(), *kind.lookups.values()]
    for ending in (*(part.ending for part in parts), *([ROWS] if kind.rows else [])):
        if tensor.startswith(PREFIX) and tensor.endswith(f".{ending}"):
            return tensor[len(PREFIX) : -len(ending) - 1], ending
    return None


def _modules_to_save(
    kind: Kind, leaves: Sequence[str], tensors: Iterable[str], task_type: str | None, table: Table, outline: Outline
) -> list[str]:  # fmt: skip
    """The modules of leaves of the base or of a head."""
    top = [leaf for leaf in leaves if leaf.startswith("head/") and task_type in TASKS]
    paths = [peft_saved.above(peft_saved.published(leaf, table)[0]) for leaf in top]
    heads = {next((module for module in path if ends(module, SAVED[task_type])), path[-1]) for path in paths if task_type}
    if not (others := [leaf for leaf in leaves if leaf not in top]):
        return sorted(heads)
    if not (kind.parts or kind.norms):
        raise ValueError(f"PEFT trains nothing else with {kind.method}, and here {tree.listing(others)} learned. Use --format=hf.")
    adapted = {found[0] for name in tensors if (found := _split(name, kind))}
    output = peft_tied.output(outline.leaves, table) if "embed/table" in leaves else ""
    return sorted({*heads, *peft_saved.spell(others, outline.leaves, adapted, table), *([output] if output else [])})


# Modules with rows of added tokens.


def _token_indices(flat: Leaves, tensors: Iterable[str], added: tuple[int, int]) -> dict[str, list[int]]:
    """trainable_token_indices: the ids whose rows are in the file, for the embedding and, if it is not tied, for the head."""
    for leaf in names.ADDED:
        if leaf in flat and flat[leaf].shape[0] != added[1]:
            raise ValueError(f"{leaf} has {flat[leaf].shape[0]} rows, and added={added} says {added[1]}.")
    modules = [name.removesuffix(f".{ROWS}").rpartition(".")[2] for name in tensors if name.endswith(ROWS)]
    return {module: list(range(added[0], added[0] + added[1])) for module in modules}


def _added(said: Mapping[str, Sequence[int]] | Sequence[int] | None, directory: Path) -> tuple[int, int]:
    """(first, count) of trainable_token_indices, which must be consecutive and the same for the embedding and the head."""
    if not said:
        return 0, 0
    rows = {tuple(ids) for ids in (said.values() if isinstance(said, Mapping) else [said])}
    ids = sorted(rows)[0]
    if len(rows) > 1 or ids != tuple(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"{directory / CONFIG}: trainable_token_indices={said!r} must be one range of consecutive ids.")
    return ids[0], len(ids)
