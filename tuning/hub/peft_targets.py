"""Which modules an adapter in a PEFT directory stands at: target_modules, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.core import tree
from tuning.hub import peft_tied
from tuning.hub.names import Table
from tuning.hub.peft_kinds import CONFIG, Kind, Leaves
from tuning.hub.peft_modules import Projections, projections, spell, targeted
from tuning.nn import stack
from tuning.nn.sites import Outline


def network(kind: Kind, outline: Outline, table: Table) -> Projections:
    """The places where an adapter of this kind may stand."""
    sites = outline.sites if kind.parts else ()
    if kind.lookups:
        sites = (*sites, *outline.embeds, *(outline.heads if kind.parts else ()))
    return projections(sites, table, peft_tied.output(outline.leaves, table) if kind.parts and kind.lookups else "")


def tell(kind: Kind, method: Mapping[str, Any], own: Leaves, table: Table, outline: Outline) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors of no module, what adapter_config.json says) of the adapters `own`.

    ValueError unless all layers that could have one have it.
    """
    net = network(kind, outline, table)
    places: dict[str, set[int]] = {}
    for leaf in own:
        role, layers = stack.apart(leaf.partition("/adapter/")[0])
        places.setdefault(role, set()).update(layers or ())
    if short := {role: sorted(has) for role, has in places.items() if tuple(sorted(has)) != net.layers.get(role)}:
        raise ValueError(f"An adapter for PEFT must be in all layers that have its place; layers that have it: {short}.")
    roles = [role for role in net.modules if role in places]
    targets = spell(roles, net)
    if "embed" in roles and net.tied:
        extra = [net.tied, peft_tied.TYING[1]]
        targets = "|".join([targets, *extra]) if isinstance(targets, str) else sorted({*targets, *extra})
    inner = [role for role in roles if net.layers[role]]
    conv = bool(inner) and not any(row.transposed for row in table if row.leaf.removesuffix("/kernel") in inner)
    said = {"fan_in_fan_out": conv} if kind.conv and kind.parts else {}
    tying = {"ensure_weight_tying": True} if "embed" in roles and net.tied else {}
    common = dict(zip(kind.common, kind.draw(method, roles, net), strict=True))
    return common, {"target_modules": targets, **said, **tying, **kind.tell(method, roles, net, own)}


def hear(kind: Kind, modules: set[str], net: Projections, raw: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    """The roles of adapted modules. ValueError for one that the network does not have, or that target_modules names wrongly."""
    said, of = raw.get("target_modules"), {module: role for role in net.modules for module in net.paths(role)}
    left = modules - of.keys() - {net.tied}
    if not kind.parts:  # PEFT stores copies for modules that share the embedding's weights, which are no targets
        left = {module for module in left if targeted(module, said)}
    if left:
        raise ValueError(f"Adapters on modules that are not projections of this network's layers: {tree.listing(sorted(left))}.")
    for module, role in of.items():
        named = targeted(module, said) and not (said == "all-linear" and not net.layers[role])
        if named != (module in modules):
            has = "tensors, and is not named by it" if module in modules else "no tensors, and is named by it"
            raise ValueError(f"{directory / CONFIG}: target_modules={json.dumps(said)}: {module} ({role}) has {has}.")
    roles = tuple(role for role in net.modules if any(module in modules for module in net.paths(role)))
    for role in roles:
        if missing := [module for module in net.paths(role) if module not in modules]:
            raise ValueError(f"{directory} has adapters in some layers only; all layers need one here. Missing: {tree.listing(missing)}.")
    if not roles and net.tied not in modules:
        raise ValueError(f"There is no adapter in {directory}.")
    peft_tied.check_tying(roles, net, modules, raw, directory)
    return roles
