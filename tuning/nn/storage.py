"""What the kernels of a network are kept as where they do not learn: arrays, or codes (quantised.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tuning.nn import quantised, stack
from tuning.nn.quantised import KINDS, Quantised, Scales
from tuning.nn.sites import named


@dataclasses.dataclass(frozen=True)
class Storage:
    """How kernels are quantised.

    kind        one of KINDS
    block       values that share a scale
    double      whether the scales are quantised too
    exceptions  `target=kind`: another kind, or "none", for the projections that targets name; the first that names one counts
    ValueError for what is no kind. Its fields are config keys of the model: quantise, quantise_block and so on.
    """

    kind: str
    block: int = 64
    double: bool = True
    exceptions: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"model.quantise={self.kind!r} is not one of {', '.join(KINDS)}.")
        for entry in self.exceptions:
            if "=" not in entry or entry.rpartition("=")[2] not in (*KINDS, "none"):
                raise ValueError(f"model.quantise_except: {entry!r} is not target=kind, with a kind of {', '.join(KINDS)} or none.")

    def quantise(self, kernel: jax.Array) -> Quantised:
        return quantised.quantise(kernel, self.kind, self.block, self.double)

    def choose(self, frozen: Mapping[str, tuple[int, ...]]) -> dict[str, Storage]:
        """How each of the kernels in layers is kept, by name, among the frozen leaves of these shapes. Routers are not quantised.

        ValueError if one cannot be, if an exception names none, or if none is left.
        """
        roles = {name: stack.apart(name)[0].removesuffix("/kernel") for name in frozen if stack.layer_range(name) and _is_kernel(name)}
        exceptions = [entry.rpartition("=")[::2] for entry in self.exceptions]
        for target, _ in exceptions:
            if not any(named(target, role) for role in roles.values()):
                raise ValueError(f"model.quantise_except: {target!r} names none of {', '.join(dict.fromkeys(roles.values()))}.")
        found = {}
        for name, role in roles.items():
            kind = next((kind for target, kind in exceptions if named(target, role)), self.kind)
            if kind == "none":
                continue
            try:
                quantised.check(frozen[name], kind, self.block)
            except ValueError as error:
                raise ValueError(f"model.quantise={kind!r}, {name}: {error} (model.quantise_block, model.quantise_except)") from None
            found[name] = Storage(kind, self.block, self.double)
        if not found:
            raise ValueError(f"model.quantise={self.kind!r} is for kernels of layers that do not learn, and there is none.")
        return found


def into(like: Any) -> Callable[[jax.Array], Quantised] | None:
    """What makes a kernel, or a part of its layers, what `like` in the layout is, in its shards; None for an array."""
    if not isinstance(like, Quantised):
        return None
    quantise = Storage(like.kind, like.block, isinstance(like.scales, Scales)).quantise
    return jax.jit(quantise, out_shardings=jax.tree.map(lambda x: x.sharding, like))


def _is_kernel(name: str) -> bool:
    return name.endswith("/kernel") and "/adapter/" not in name and not name.endswith("/router/kernel")
