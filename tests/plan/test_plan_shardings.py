"""Where the arrays of every shipped run live, as written down in tests/golden/shardings; UPDATE_GOLDEN=1 writes it anew."""

import importlib.util
import math
import os
import re
from pathlib import Path

import pytest

from tuning import build
from tuning.core import tree
from tuning.data import loader
from tuning.nn.quantised import Quantised
from tuning.plan import topology

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "shardings"


def modules():
    """The configs that have plans."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        if "\nPLANS" in path.read_text():
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield pytest.param(module, id=path.stem)


def dump(config, where):
    """Lines `leaf shape dtype split`, of layers that are stacked apart but alike together; the batch last."""
    parts = build.parts(config, sketch=topology.parse(where).absent)
    lines = {}
    for name, leaf in tree.flatten(parts.model.layout).items():
        place = re.sub(r"blocks/[\dx-]+/", "blocks/*/", name)
        codes = leaf.codes if isinstance(leaf, Quantised) else leaf
        shape = re.sub(r"^\(\d+, ", "(L, ", str(codes.shape)) if "blocks/" in name else str(codes.shape)
        kind = leaf.kind if isinstance(leaf, Quantised) else codes.dtype
        lines[f"{place} {shape} {kind} {tuple(codes.sharding.spec)}{' learns' if parts.model.tuned(name) else ''}"] = None
    batch = loader.abstract(parts.train, parts.settings.batch_size, parts.model.mesh).tokens
    held = math.prod(batch.sharding.shard_shape(batch.shape))
    return [*lines, f"batch {batch.shape} in {parts.settings.accumulate} microbatches: {held} tokens on a device"]


@pytest.mark.parametrize("module", modules())
def test_every_array_of_a_shipped_run_lives_where_it_is_written(module):
    found = []
    for plan in module.PLANS:
        found += [f"# {plan}", *dump(module.get_config(plan).to_dict(), plan.partition(",")[2]), ""]
    path = GOLDEN / f"{module.__name__}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(found))
    assert path.read_text().splitlines() == "\n".join(found).splitlines()
