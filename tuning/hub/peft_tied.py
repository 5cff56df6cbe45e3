"""PEFT and modules that share the embedding's weights: an output that is tied to it, the two sides of an encoder-decoder.

Here such modules are one leaf, and what changes the embedding changes all. For PEFT they are modules of their own. It changes the output
with the embedding if it is told to `ensure_weight_tying` and finds one of the names TYING among its targets; else one side alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tuning.core import mesh, tree
from tuning.hub import files
from tuning.hub.names import Table
from tuning.hub.peft_kinds import BASE, CONFIG, PREFIX, Kind, Leaves
from tuning.hub.peft_modules import Projections, targeted
from tuning.nn.sites import Outline

TYING = ("embed_tokens", "lm_head")
SHARED = ("embed/table", "embed/adapter/")


def output(leaves: Container[str], table: Table) -> str:
    """The module of an output that is the embedding, in a network with these leaves; "" where there is none."""
    outputs = [row.tensor for row in table if row.leaf == "head/kernel"]
    return "" if "head/kernel" in leaves or not outputs else outputs[0].removesuffix(".weight")


def module_of(tensor: str) -> str:
    """The module of a tensor of the file, at the embedding or at a module that shares its weights."""
    path = tensor.removeprefix(PREFIX)
    ending = next((ending for ending in (".lora_A.weight", ".lora_B.weight") if path.endswith(ending)), None)
    return path.removesuffix(ending) if ending else path.rpartition(".")[0]


def copies(kind: Kind, tensors: Iterable[str], want: Iterable[str], table: Table) -> list[str]:
    """The modules in a file that hold values of the wanted leaves again, because they share the embedding's weights."""
    if kind.lookups and not kind.parts:
        (part,) = kind.lookups.values()
        return [module_of(name) for name in tensors if name.endswith(f".{part.tied}")]
    top = output((), table)
    apart = any(name.startswith("head/") for name in want) or not any(name.startswith(SHARED) for name in want)
    return [] if apart or not any(module_of(name) == top for name in tensors) else [top]


def check_writable(kind: Kind, leaves: Iterable[str], table: Table, shared: Sequence[str]) -> None:
    """ValueError where PEFT would leave `shared` modules as they are though the embedding changes."""
    apart = [module for module in shared if module != output((), table)]
    if kind.parts and apart and any(name.startswith(SHARED) for name in leaves):
        raise ValueError(
            f"PEFT takes {', '.join(apart)}, which share the embedding's weights, for modules of their own. Use --format=hf --merge."
        )


def check_encoder(roles: Sequence[str], saved: Sequence[str], outline: Outline, directory: Path) -> None:
    """ValueError for a changed embedding of an encoder-decoder."""
    if ("embed" in roles or "embed/table" in saved) and any(site.role.startswith("encoder/") for site in outline.sites):
        raise ValueError(f"{directory}: PEFT takes the embedding of an encoder-decoder apart from what encoder and decoder look up.")


def check_tying(roles: Sequence[str], net: Projections, modules: set[str], raw: Mapping[str, Any], directory: Path) -> None:
    """ValueError where PEFT would change one side alone of an embedding that is the output too."""
    if not net.tied or not ("embed" in roles or net.tied in modules):
        return
    said = raw.get("target_modules")
    finds = any(targeted(name, said) if isinstance(said, str) else name in {t.rpartition(".")[2] for t in said or ()} for name in TYING)
    if not ("embed" in roles and net.tied in modules and raw.get("ensure_weight_tying") and finds):
        raise ValueError(
            f"{directory / CONFIG}: the output {net.tied} is tied to the embedding, and PEFT would change one of them alone: "
            f"ensure_weight_tying={raw.get('ensure_weight_tying')!r}, target_modules={json.dumps(said)}, adapters on "
            f"{tree.listing(sorted(modules & {net.tied, *net.modules.values()}))}. Train with ensure_weight_tying=True and lm_head among "
            "the targets, or untie the base first."
        )


def check_saved(top: str, held: Container[str], saved: Sequence[str], raw: Mapping[str, Any], directory: Path) -> None:
    """ValueError where the values of one of the embedding and its tied output `top` are in the file, and not those of the other."""
    if top and (f"{top}.weight" in held) != ("embed/table" in saved):
        raise ValueError(
            f"{directory / CONFIG}: modules_to_save={json.dumps(raw.get('modules_to_save'))}: {top} and the embedding have the same "
            "weights, and one of them alone was trained. Train both (ensure_weight_tying=True), or untie the base first."
        )


def check_values(directory: Path, tensors: files.Tensors, expected: Leaves, shared: Sequence[str]) -> None:
    """ValueError unless the `shared` modules in the file have the values of the embedding."""
    for name, value in expected.items():
        if module_of(name) in shared and not np.array_equal(tensors.read(name).astype(value.dtype), value):
            raise ValueError(f"{directory}: {name} has other values than the embedding.")


def check_base(
    directory: Path, tensors: files.Tensors, table: Table, leaves: Iterable[str], of_base: Callable[[str], jax.Array]
) -> None:  # fmt: skip
    """ValueError if a directory holds an embedding or an output, under its adapter there, that is not this base's: `of_base(leaf)`."""
    leaves = list(leaves)
    top = output(leaves, table)
    where = {row.tensor: (row.leaf, row.transposed) for row in table}
    where |= {f"{top}.weight": ("embed/table", False), f"{top}.bias": ("head/bias", False)} if top else {}
    for name in (name for name in tensors if BASE in name):
        leaf, turned = where.get(name.removeprefix(PREFIX).replace(BASE, "."), ("", False))
        x = tensors.read(name)
        x, y = x.T if turned else x, mesh.gather(of_base(leaf)) if leaf in leaves else None
        if y is None or x.shape != y.shape or not (np.array_equal(x.astype(y.dtype), y) or np.array_equal(x, y.astype(x.dtype))):
            raise ValueError(f"{directory}: {name} is not what this base has there. Load the adapter on the base that it was trained on.")
