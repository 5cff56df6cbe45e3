"""What `train --dry_run` prints: the resolved config, the parameter table, the batch, one example with its learned tokens."""

from __future__ import annotations

import math
import re

from rich.table import Table

from tuning import api, build
from tuning.core import config as configs
from tuning.core import tree
from tuning.data.dataset import preview
from tuning.nn.quantised import Quantised
from tuning.training.progress import console


def show(parts: build.Parts) -> None:
    """Prints it all to the terminal."""
    for key, value in configs.flat(configs.plain(parts.config)).items():
        console.print(f"{key} = {value!r}", markup=False)
    console.print(parameters(parts.model))
    console.print(api.summary(parts), markup=False)
    shape = (parts.settings.batch_size, parts.train.length)
    pieces = f", in {parts.settings.accumulate} microbatches" if parts.settings.accumulate > 1 else ""
    console.print(f"batch: {shape[0]} x {shape[1]} tokens{pieces}; {len(parts.train):,} rows, {parts.settings.steps:,} steps = "
                  f"{parts.settings.steps * shape[0] * parts.sources[0][2] / len(parts.train):.2f} epochs")  # fmt: skip
    console.print("\nfirst row, learned tokens between « and »:", markup=False)
    console.print(preview(parts.train, parts.model.source.tokenizer), markup=False)
    console.print("\nDry run: nothing was compiled, loaded or written.")


def parameters(m: build.Model) -> Table:
    """Leaves grouped by what they are: a row for all segments of the stack that share a name."""
    groups: dict[tuple, list[str]] = {}
    leaves = tree.flatten(m.layout)
    for name, leaf in leaves.items():
        place = re.sub(r"(^|/)blocks/[\dx-]+/", r"\1blocks/*/", name)
        spec = tuple(leaf.sharding.spec)
        dtype = leaf.kind if isinstance(leaf, Quantised) else str(leaf.dtype)
        groups.setdefault((place, "tuned" if m.tuned(name) else "frozen", dtype, spec), []).append(name)
    table = Table("leaf", "shape", "count", "MiB", "dtype", "sharding", "")
    for (place, state, dtype, spec), names in groups.items():
        count = sum(math.prod(leaves[n].shape) for n in names)
        size = sum(tree.nbytes(leaves[n]) for n in names) / 2**20
        shapes = " ".join(str(leaves[n].shape) for n in names)
        table.add_row(place, shapes, f"{count:,}", f"{size:,.2f}", dtype, str(spec), state)
    table.add_row("all", "", f"{tree.size(m.layout):,}", f"{tree.nbytes(m.layout) / 2**20:,.2f}", "", "", "")
    return table
