"""What is said of a method before a run, against numbers counted from the published files."""

import json
import math
import re

import pytest
from safetensors.numpy import load_file

from tests import runs
from tuning import api, build
from tuning.nn import kernels

LENGTH, LAYERS = 32, 2


@pytest.fixture(scope="module")
def published(home):
    """({name: size} of the published tensors, forward FLOPs per token of all attention)."""
    files = (home / "model").glob("*.safetensors")
    sizes = {name: math.prod(x.shape) for file in files for name, x in load_file(file).items()}
    config = json.loads((home / "model" / "config.json").read_text())
    # Scores and their use: 2 FLOPs for each element of a query and of a value, at half of the positions.
    return sizes, LAYERS * 2 * 2 * config["hidden_size"] * LENGTH / 2


def said(home, **method):
    parts = build.parts(runs.config(home, method=method, data__train__length=LENGTH))
    text = api.summary(parts).split("\nmesh")[0].replace(",", "")
    found = re.fullmatch(
        r"trainable params: (\d+) \|\| all params: (\d+) \|\| trainable%: ([\d.]+)\n"
        r"bytes that learn: (\d+) \|\| frozen: (\d+) \|\| optimizer: (\d+) \|\| FLOPs%: ([\d.]+) of full tuning",
        text,
    )
    assert found, text
    return [float(number) for number in found.groups()]


def expected(some, every, flops, full):
    """In float32, with Adam's two moments, its count and the schedule's."""
    return [some, every, round(100 * some / every, 4), 4 * some, 4 * (every - some), 8 * some + 8, round(100 * flops / full, 1)]


def test_the_summary_counts_parameters_bytes_and_flops(home, published):
    sizes, attention = published
    every = sum(sizes.values())
    matrices = {name: size for name, size in sizes.items() if name.endswith("proj.weight") or name == "lm_head.weight"}
    full = 3 * (2 * sum(matrices.values()) + attention)
    assert said(home, name="full") == expected(every, every, full, full)

    head = sizes["lm_head.weight"]
    assert said(home, name="partial", parts=("head",)) == expected(head, every, full / 3 + 2 * head, full)

    last = {name: size for name, size in sizes.items() if name.startswith("model.layers.1.")}
    projections = sum(matrices.get(name, 0) for name in last)
    flops = full / 3 + 4 * projections + 2 * attention / LAYERS + 2 * head  # back through the head and the last layer
    assert said(home, name="partial", last_layers=1) == expected(sum(last.values()), every, flops, full)


def test_an_adapter_is_no_part_of_full_tuning(home, published):
    sizes, attention = published
    every, rank = sum(sizes.values()), 4
    shapes = {name: size for name, size in sizes.items() if name.endswith("q_proj.weight")}
    added = sum(2 * rank * math.isqrt(size) for size in shapes.values())  # the queries' matrices are square
    matrices = sum(size for name, size in sizes.items() if name.endswith("proj.weight") or name == "lm_head.weight")
    full = 3 * (2 * matrices + attention)
    flops = 2 * (2 * matrices + attention) + attention + 3 * 2 * added  # no gradient of the frozen matrices
    assert said(home, name="lora", rank=rank, targets=("q",)) == expected(added, every + added, flops, full)


def test_the_form_of_attention_is_said_with_the_reason_where_the_device_has_another(home, monkeypatch):
    config = runs.config(home, data__train__length=LENGTH)
    assert "remat none; attention blockwise\n" in api.summary(build.parts(config))
    monkeypatch.setitem(kernels.NATIVE, "cpu", "splash_interpreted")
    assert "attention blockwise (splash_interpreted: length=32 is no multiple of 128)\n" in api.summary(build.parts(config))
    config["data"]["train"]["length"] = 128
    assert "attention splash_interpreted\n" in api.summary(build.parts(config))
