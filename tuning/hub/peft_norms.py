"""PEFT's LN_TUNING: norms that learned, each as a copy inside the module of the base that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from tuning.core import tree
from tuning.hub import peft_saved
from tuning.hub.files import Tensors
from tuning.hub.names import Table
from tuning.methods.partial import PARTS

COPY = "ln_tuning_layers."


def is_norm(leaf: str) -> bool:
    return re.search(PARTS["norms"], leaf) is not None


def copied(tensor: str) -> str:
    """What PEFT calls the copy of a tensor."""
    module, _, last = tensor.rpartition(".")
    return f"{module}.{COPY}{last}"


def tell(leaves: Iterable[str], every: Iterable[str], table: Table) -> tuple[list[str], dict[str, str]]:
    """(target_modules, {a norm's tensor: its copy}) for leaves that learned. ValueError if no norm did, or those of some layers alone."""
    learned, known = list(leaves), set(every)
    if cut := [leaf for leaf in learned if leaf not in known]:
        raise ValueError(f"PEFT has partial tuning of norms in all layers, and here {tree.listing(cut)} learned. Use --format=hf.")
    norms = [leaf for leaf in learned if is_norm(leaf)]
    if not norms:
        raise ValueError("PEFT has partial tuning of norms, with what else learned beside them; here no norm learned. Use --format=hf.")
    return peft_saved.spell(norms, every, (), table), {name: copied(name) for leaf in norms for name in peft_saved.published(leaf, table)}


class Copied:
    """The tensors of a file with the copies under the names of what they stand for."""

    def __init__(self, tensors: Tensors):
        self.tensors, self.names = tensors, {name.replace(COPY, "", 1): name for name in tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.names[name])

    def read(self, name: str) -> np.ndarray:
        return self.tensors.read(self.names[name])
