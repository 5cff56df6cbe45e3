"""AdaLoRA's tensors in a PEFT file: what was pruned for good is left out there, and adapter_config.json says where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tuning.hub.files import Tensors


class Grown:
    """The tensors of a file with zeros at the ranks that its rank_pattern ({module.lora_E: whether each rank is there}) says are not."""

    def __init__(self, raw: Mapping[str, Any], tensors: Tensors):
        self.tensors, patterns = tensors, raw.get("rank_pattern") or {}
        self.kept = {name.removesuffix(".default").rpartition(".")[0]: np.array(kept, bool) for name, kept in patterns.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        shape, (kept, axis) = self.tensors.shape(name), self._ranks(name)
        if kept is None or shape[axis] != kept.sum():
            return shape
        return (*shape[:axis], kept.size, *shape[axis + 1 :])

    def read(self, name: str) -> np.ndarray:
        x, (kept, axis) = self.tensors.read(name), self._ranks(name)
        if self.shape(name) == x.shape or kept is None:
            return x
        whole = np.zeros(self.shape(name), x.dtype)
        whole[(slice(None),) * axis + (kept,)] = x
        return whole

    def _ranks(self, name: str) -> tuple[np.ndarray | None, int]:
        """(which ranks are there, the axis that they are)."""
        module, _, part = name.removeprefix("base_model.model.").rpartition(".")
        return self.kept.get(module), int(part == "lora_B")
