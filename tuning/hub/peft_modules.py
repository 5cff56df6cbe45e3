"""The modules of a network as PEFT names them, and its rules for what a name in adapter_config.json means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tuning.hub.names import Table
from tuning.nn.sites import Site


class Projections(NamedTuple):
    """The projections of a network that offer sites, as the file calls them.

    sites    by role; the layers that have it are in `layers`
    modules  {role: module, with `{layer}`}
    others   the network's other modules, `{layer}` and `{expert}` in them
    tied     the module of an output that is the embedding, which an adapter of the embedding changes too; or ""
    """

    sites: dict[str, Site]
    layers: dict[str, tuple[int, ...]]
    modules: dict[str, str]
    others: tuple[str, ...]
    tied: str = ""

    def paths(self, role: str) -> list[str]:
        """The role's modules, one for each layer that has it."""
        return [self.modules[role].format(layer=i) for i in self.layers[role]] or [self.modules[role]]

    def changed(self, role: str) -> list[str]:
        """Those, and the output where the embedding is it."""
        return [*self.paths(role), *([self.tied] if self.tied and role == "embed" else [])]


def projections(sites: Iterable[Site], table: Table, tied: str = "") -> Projections:
    """The places that `sites` are, by the family's table: projections, or the embedding."""
    sites = tuple(sites)
    rows = {
        row.leaf.rpartition("/")[0]: row.tensor
        for row in table
        if row.leaf.endswith(("/kernel", "embed/table")) and "{expert}" not in row.tensor
    }
    of = {site.role: site for site in sites if rows.get(site.role, "").endswith(".weight")}
    layers = {role: tuple(sorted({i for site in sites if site.role == role for i in site.layers})) for role in of}
    named = {role: rows[role].removesuffix(".weight") for role in of}
    others = {row.tensor.rpartition(".")[0] for row in table} - set(named.values())
    return Projections(of, layers, named, tuple(sorted(others)), tied)


# Naming modules.


def targeted(module: str, target: Any) -> bool:
    """PEFT's rule for target_modules: a list holds whole last parts of names; a string is a pattern for the whole name, or `all-linear`."""
    if target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target or ())


def ends(module: str, said: Any) -> bool:
    """PEFT's rule for feedforward_modules and modules_to_save: a list holds ends of names, which need not begin at a dot."""
    return re.fullmatch(said, module) is not None if isinstance(said, str) else any(module.endswith(name) for name in said or ())


def pattern(module: str) -> str:
    """A regular expression for the module in any layer."""
    return re.escape(module).replace(re.escape("{layer}"), r"(\d+)").replace(re.escape("{expert}"), r"\d+")


def spell(roles: Iterable[str], net: Projections, rule: Callable[[str, Any], bool] = targeted) -> list[str] | str:
    """The roles' modules for PEFT: the last parts of their names or, where another module's name ends like that too, a regular expression
    for whole names."""
    chosen = [net.modules[role] for role in roles]
    last = sorted({module.rpartition(".")[2] for module in chosen})
    apart = not any(rule(module, last) for module in {*net.modules.values(), *net.others}.difference(chosen))
    return last if apart else "|".join(map(pattern, chosen))
