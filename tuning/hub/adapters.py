"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors (the formats of peft 0.21).

PEFT loads a file whose names are wrong as if it were empty, so nothing is taken on trust here: a key that cannot be honoured, a tensor
that is missing or left over, a shape that does not fit, each is a ValueError. What tells the methods apart stands in peft_kinds.

Shapes: N added tokens, D width, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tuning.core import mesh, tree
from tuning.core.types import Tree
from tuning.hub import files, names
from tuning.hub.names import Table
from tuning.hub.peft_kinds import CONFIG, KINDS, Kind, Leaves, Projections, ends, projections, spell, targeted, whole
from tuning.nn import stack
from tuning.nn.sites import Outline

STEM, PREFIX, PACKED = "adapter_model", "base_model.model.", "prompt_embeddings"
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
    saved   leaves of a head that it brings along
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

    leaves      the adapters, `blocks/0-15/attn/q/adapter/a`; the rows of added tokens, `embed/added` and `head/added` [N, D]; the leaves
                of a new head, if the task_type is that of one
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
    task_type = (task_type or "FEATURE_EXTRACTION") if kind.pack else task_type
    tensors = _tensors(kind, flat, table, 2 if task_type == "SEQ_2_SEQ_LM" else 1, copies)
    config = {
        "peft_type": peft_type, "task_type": task_type, "base_model_name_or_path": base_model, "revision": revision,
        "inference_mode": True, **kind.constant, **{key: whole(method[ours]) for key, (ours, _) in kind.keys.items() if ours in method},
    }  # fmt: skip
    if top := _own(flat, "head"):
        config["modules_to_save"] = _modules_to_save(top, task_type, table)
    if kind.pack:
        sides = 2 if task_type == "SEQ_2_SEQ_LM" else 1
        config |= {"num_attention_heads": heads, "num_transformer_submodules": sides, **kind.pack.tell(_own(flat, "adapter"))}
    else:
        config |= _tell(kind, method, flat, table, outline)
    if added[1]:
        config["trainable_token_indices"] = _token_indices(flat, tensors, added)
    if jax.process_index() != 0:
        return directory
    files.write(directory, tensors.items(), stem=STEM)
    files.write_json(directory / CONFIG, config)
    again = tree.flatten(read(directory, tree.unflatten(flat), table))
    if bad := [name for name, value in flat.items() if not np.array_equal(again[name], value, equal_nan=True)]:
        raise ValueError(f"{directory}: read back, {tree.listing(bad)} differ from what was written.")
    said = settings(directory, table, outline).method
    if bad := [ours for ours, _ in kind.keys.values() if ours in method and said[ours] != method[ours]]:
        raise ValueError(f"{directory}: read back, it says {', '.join(f'{key}={said[key]!r}' for key in bad)}; written was {dict(method)}.")
    return directory


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
    kind, tensors = KINDS[raw["peft_type"]], files.Tensors(directory, STEM)
    modules, rows, saved = _sort(tensors, kind, raw, table, directory)
    method: dict[str, Any] = {"name": kind.reads_as or kind.method}
    method |= {ours: _value(directory, raw, key, default) for key, (ours, default) in kind.keys.items()}
    if not kind.pack:
        net = projections(outline.embeds if kind.embed else outline.sites, table)
        roles = _roles(modules, net, raw, directory)
        method |= {**({} if kind.embed else {"targets": roles}), **kind.hear(raw, roles, net)}
    said = raw.get("trainable_token_indices")
    if bool(said) != bool(rows):
        raise ValueError(
            f"{directory / CONFIG}: trainable_token_indices={said!r}, and the file has rows of {tree.listing(rows) or 'none'}."
        )
    return Settings(method, _added(said, directory), saved)


def saved(directory: Path, table: Table) -> tuple[str, ...]:
    """The leaves of a head that a directory brings along."""
    raw = read_config(directory)
    return _sort(files.Tensors(directory, STEM), KINDS[raw["peft_type"]], raw, table, directory)[2]


def read(directory: Path, abstract: Tree, table: Table) -> Tree:
    """The leaves of `abstract` (adapters, rows of added tokens, a head), as numpy arrays in its shapes and dtypes.

    ValueError that lists missing, left-over and misshaped tensors.
    """
    raw = read_config(directory)
    kind, tensors, want = KINDS[raw["peft_type"]], files.Tensors(directory, STEM), tree.flatten(abstract)
    blank = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in want.items()}
    sides = raw.get("num_transformer_submodules") or (2 if raw.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    own = _own(blank, "adapter")
    for key, value in kind.pack.tell(own).items() if kind.pack else ():
        if raw.get(key) not in (None, value):
            raise ValueError(f"{directory / CONFIG}: {key}={raw[key]!r}, and it is {value} in this network.")
    copies = [found[0] for name in tensors if kind.embed and (found := _split(name, kind))]
    expected = {name: value.shape for name, value in _tensors(kind, blank, table, sides, copies).items()}
    _fits(directory, tensors, expected)
    values = kind.pack.read(tensors.read(PACKED), own) if kind.pack else {}
    for leaf, target in want.items():
        if leaf not in values:
            place, part = _place(kind, leaf, target.shape, table)
            back = part.read if part else (lambda x, turn=place.transposed: x.T if turn else x)
            values[leaf] = np.stack([back(tensors.read(name)) for name in place.tensors])
        values[leaf] = values[leaf].reshape(target.shape).astype(target.dtype)
    if kind.embed:  # PEFT stores them once for each module that shares the embedding
        (leaf,) = own
        for name in tensors:
            if _split(name, kind) and not np.array_equal(tensors.read(name).astype(want[leaf].dtype), values[leaf]):
                raise ValueError(f"{directory}: {name} has other rows than the embedding.")
    return tree.unflatten(values)


def _fits(directory: Path, tensors: files.Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{n} {tensors.shape(n)}, expected {shape}" for n, shape in expected.items() if n in tensors and tensors.shape(n) != shape]
    kinds = {
        "missing": [n for n in expected if n not in tensors],
        "unmatched": [n for n in tensors if n not in expected],
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
    """The leaves of the adapter, or those of the head."""
    return {name: x for name, x in leaves.items() if name not in names.ADDED and ("/adapter/" in name) == (what == "adapter")}


def _tensors(kind: Kind, leaves: Leaves, table: Table, sides: int, copies: Iterable[str]) -> dict[str, np.ndarray]:
    """The file's tensors by name."""
    tensors, own = {}, _own(leaves, "adapter")
    if not own:
        raise ValueError(f"There is no leaf of an adapter (.../adapter/{next(iter(kind.parts), 'prompt')}) to write.")
    for leaf, value in leaves.items():
        if kind.pack and leaf in own:
            continue
        place, part = _place(kind, leaf, value.shape, table)
        role = leaf.partition("/adapter/")[0]
        for index, name in zip(np.ndindex(*place.lead), place.tensors, strict=True):
            one = part.write(value[index], role) if part else value[index].T if place.transposed else value[index]
            tensors[name] = np.ascontiguousarray(one)
            if part and kind.embed:
                tensors |= {f"{PREFIX}{module}.{part.ending}": tensors[name] for module in copies}
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
    if name not in kind.parts:
        raise ValueError(f"The leaf {leaf} is not {kind.method}'s, whose adapters hold {', '.join(kind.parts)}.")
    base = names.place(f"{module}/{'table' if kind.embed else 'kernel'}", shape[:3], table)
    if not base.tensors[0].endswith(".weight"):
        raise ValueError(f"PEFT has no adapter for {base.tensors[0]}: use --format=hf --merge.")
    if not (base.transposed or kind.conv or kind.embed):
        raise ValueError(f"PEFT has no {kind.method} for {base.tensors[0]}, which is no nn.Linear there. Use --format=hf --merge.")
    part = kind.parts[name]
    return names.Place(tuple(f"{prefix}{x.removesuffix('weight')}{part.ending}" for x in base.tensors), base.lead, base.transposed), part


def _sort(tensors: files.Tensors, kind: Kind, raw: Mapping[str, Any], table: Table, directory: Path):
    """(adapted modules, modules with rows of added tokens, leaves of a head). ValueError for a tensor that is none of these."""
    saved_as = {
        place.tensors[0]: row.leaf for row in table if row.leaf.startswith("head/") for place in [_place(kind, row.leaf, (), table)[0]]
    }
    modules, rows, saved, strange = set(), set(), [], []
    for name in tensors:
        found = _split(name, kind)
        if name in saved_as:
            saved.append(name)
        elif found:
            (rows if found[1] == ROWS else modules).add(found[0])
        elif name != PACKED or not kind.pack:
            strange.append(name)
    if strange:
        form = PACKED if kind.pack else f"{PREFIX}model.layers.0.self_attn.q_proj.{next(iter(kind.parts.values())).ending}"
        raise ValueError(
            f"{directory} has tensors that are no part of a {raw['peft_type']} adapter: {tree.listing(strange)}. Names have the form "
            f"{form}; PEFT would load others as if they were not there."
        )
    task = "" if kind.embed else raw.get("task_type") or ""  # PEFT has no modules_to_save with trained rows
    if task in TASKS and not saved:
        raise ValueError(f"{directory / CONFIG}: task_type={task!r}, and the file has no head of this network.")
    told = (*(raw.get("modules_to_save") or ()), *SAVED.get(task, ()))
    for name in saved_as:
        named = any(ends(module, told) for module in _above(name))
        if named != (name in saved) and not (named and name.endswith(".bias")):  # which a projection may lack
            has = "is in the file, and not named by it" if name in saved else "is named by it, and not in the file"
            raise ValueError(f"{directory / CONFIG}: modules_to_save={json.dumps(raw.get('modules_to_save'))}: {name} {has}.")
    return modules, rows, tuple(saved_as[name] for name in saved)


def _split(tensor: str, kind: Kind) -> tuple[str, str] | None:
    """(`model.layers.0.self_attn.q_proj`, ending) of one of a module's tensors; None for a name that is not this kind's."""
    for ending in (*(part.ending for part in kind.parts.values()), *([ROWS] if kind.rows else [])):
        if tensor.startswith(PREFIX) and tensor.endswith(f".{ending}"):
            return tensor[len(PREFIX) : -len(ending) - 1], ending
    return None


def _above(tensor: str) -> list[str]:
    """The modules that a tensor of the file lies in, as PEFT names them."""
    path = tensor.removeprefix(PREFIX).removeprefix("base_model.").split(".")[:-1]
    return [".".join(path[: i + 1]) for i in range(len(path))]


def _modules_to_save(leaves: Leaves, task_type: str | None, table: Table) -> list[str]:
    """The modules of a head's leaves."""
    if task_type not in TASKS:
        raise ValueError(f"PEFT keeps no new head of task_type={task_type!r} ({tree.listing(leaves)}). Use --format=hf --merge.")
    paths = [_above(names.place(leaf, x.shape, table).tensors[0]) for leaf, x in leaves.items()]
    return sorted({next((module for module in path if ends(module, SAVED[task_type])), path[-1]) for path in paths})


# Modules.


def _tell(kind: Kind, method: Mapping[str, Any], leaves: Leaves, table: Table, outline: Outline) -> dict[str, Any]:
    """What adapter_config.json says of the adapted modules. ValueError unless all layers that could have an adapter have it."""
    net = projections(outline.embeds if kind.embed else outline.sites, table)
    places: dict[str, set[int]] = {}
    for leaf in _own(leaves, "adapter"):
        role, layers = stack.apart(leaf.partition("/adapter/")[0])
        places.setdefault(role, set()).update(layers or ())
    if short := {role: sorted(has) for role, has in places.items() if tuple(sorted(has)) != net.layers.get(role)}:
        raise ValueError(f"An adapter for PEFT must be in all layers that have its place; layers that have it: {short}.")
    roles = [role for role in net.modules if role in places]
    conv = not any(row.transposed for row in table if row.leaf.removesuffix("/kernel") in roles)
    said = {"fan_in_fan_out": conv} if kind.conv and not kind.embed else {}
    return {"target_modules": spell(roles, net), **said, **kind.tell(method, roles, net, _own(leaves, "adapter"))}


def _roles(modules: set[str], net: Projections, raw: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    """The adapted roles. ValueError for a module that the network does not have, or that target_modules names wrongly."""
    said, of = raw.get("target_modules"), {module: role for role in net.modules for module in net.paths(role)}
    left = modules - of.keys()
    if "embed" in net.modules:  # PEFT stores copies for modules that share its weights, which are no targets
        left = {module for module in left if targeted(module, said)}
    if left:
        raise ValueError(f"Adapters on modules that are not projections of this network's layers: {tree.listing(sorted(left))}.")
    for module, role in of.items():
        if targeted(module, said) != (module in modules):
            has = "tensors, and is not named by it" if module in modules else "no tensors, and is named by it"
            raise ValueError(f"{directory / CONFIG}: target_modules={json.dumps(said)}: {module} ({role}) has {has}.")
    roles = tuple(role for role in net.modules if any(module in modules for module in net.paths(role)))
    for role in roles:
        if missing := [module for module in net.paths(role) if module not in modules]:
            raise ValueError(f"{directory} has adapters in some layers only; all layers need one here. Missing: {tree.listing(missing)}.")
    if not roles:
        raise ValueError(f"There is no adapter in {directory}.")
    return roles


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
