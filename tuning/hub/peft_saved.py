"""Weights of the base that go with an adapter in a PEFT directory: those of `modules_to_save`, which learned beside it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from tuning.core import tree
from tuning.hub import names
from tuning.hub.names import Table


def published(leaf: str, table: Table) -> tuple[str, ...]:
    """The tensors of a leaf of the base, one for each layer; none for experts, which PEFT's modules do not hold one by one."""
    try:
        return names.place(leaf, (), table).tensors
    except ValueError:
        return ()


def above(tensor: str) -> list[str]:
    """The modules that a tensor lies in, from the outermost one on."""
    path = tensor.split(".")[:-1]
    return [".".join(path[: i + 1]) for i in range(len(path))]


def spell(leaves: Iterable[str], every: Iterable[str], adapted: Container[str], table: Table) -> list[str]:
    """modules_to_save for leaves of the base: ends of names that no other module's name has.

    every    all leaves of the base
    adapted  modules that have an adapter
    ValueError where PEFT's rule cannot tell the modules apart, or would train more or less than them.
    """
    held = {leaf: [above(tensor) for tensor in published(leaf, table)] for leaf in every}
    if strange := [leaf for leaf in leaves if not held.get(leaf)]:
        raise ValueError(f"PEFT has no module for {tree.listing(strange)}. Use --format=hf --merge.")
    own = {paths[-1] for leaf in leaves for paths in held[leaf]}
    if both := [module for module in sorted(own) if module in adapted]:
        raise ValueError(f"PEFT either adapts a module or trains it whole: {tree.listing(both)}. Use --format=hf --merge.")
    if less := [leaf for leaf, paths in held.items() if leaf not in leaves and any(path[-1] in own for path in paths)]:
        raise ValueError(f"PEFT keeps whole modules, and {tree.listing(less)} belong to those that learn. Give them too.")
    others = {module for paths in held.values() for path in paths for module in path} - own
    found = set()
    for module in own:
        parts = module.split(".")
        suffixes = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        suffix = next((end for end in suffixes if not any(other.endswith(end) for other in others)), None)
        if suffix is None:
            raise ValueError(f"PEFT would train other modules whose names end like {module}. Use --format=hf --merge.")
        found.add(suffix)
    return sorted(found)


def saved(held: Container[str], named: Callable[[str], bool], every: Iterable[str], table: Table) -> tuple[str, ...]:
    """The leaves whose values a file holds (`held`, without the prefix) because adapter_config.json names their modules.

    ValueError, to be completed with the file's name, where the two say different things.
    """
    found = []
    for leaf in every:
        tensors = published(leaf, table)
        for tensor in tensors:
            if any(map(named, above(tensor))) != (tensor in held):
                has = "is in the file, and not named by it" if tensor in held else "is named by it, and not in the file"
                raise ValueError(f"{tensor} {has}.")
        here = [tensor for tensor in tensors if tensor in held]
        if here and len(here) < len(tensors):
            raise ValueError(f"{leaf} is in the file for some layers only.")
        if here:
            found.append(leaf)
    return tuple(found)
