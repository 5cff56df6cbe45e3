"""Time, money and energy: published pairs reproduce both ways, and what has no source is None and says why."""

import json
import math
import re
from pathlib import Path

import pytest

from tuning.core import tree
from tuning.core.chips import CHIPS
from tuning.hub import families, known
from tuning.models import network
from tuning.nn.sites import NOTHING
from tuning.plan import speed
from tuning.plan.speed import PUBLISHED, Efficiency, efficiency, estimate, read_prices, seconds_per_step

TEMPLATE = Path(speed.__file__).with_name("prices.json")


def flops_per_token(row):
    """By the closed formula: 6 P + 3 A for full tuning, 4 P + 6 N + 3 A for LoRA of rank 16 on all projections of a dense model."""
    c = known.config(row.model)
    L, D, H, KV, V = (c[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"))
    F, hd = c.get("moe_intermediate_size", c["intermediate_size"]), c.get("head_dim", D // H)
    experts, used = c.get("num_experts", c.get("num_local_experts", 0)), c.get("num_experts_per_tok", 1)
    linear = L * (2 * D * H * hd + 2 * D * KV * hd + 3 * D * F * used + D * experts)
    matrices, attention = linear + D * V, 2 * L * row.length * H * hd
    adapters = L * 16 * (2 * (D + H * hd) + 2 * (D + KV * hd) + 3 * (D + F))
    assert row.method == "full" or not experts
    return 6 * matrices + 3 * attention if row.method == "full" else 4 * matrices + 6 * adapters + 3 * attention


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.chip}-{row.method}-{row.model}-{row.length}-{row.devices}")
def test_a_published_throughput_and_its_utilisation_are_the_same_number(row):
    peak = CHIPS[row.chip].peak_flops
    assert flops_per_token(row) * row.tokens_per_second / peak == pytest.approx(row.mfu, abs=5e-5)
    flops = flops_per_token(row) * 1e6
    seconds = seconds_per_step(flops, CHIPS[row.chip], row.devices, Efficiency(row.mfu, row.source))
    assert 1e6 / seconds / row.devices == pytest.approx(row.tokens_per_second, rel=2e-4)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.chip}-{row.method}-{row.model}-{row.length}-{row.devices}")
def test_the_nearest_run_to_a_published_one_is_itself(row):
    model = speed.MODELS[row.model]
    found = efficiency(CHIPS[row.chip], model.parameters, row.method, row.length, row.devices, model.routed)
    assert found.mfu == row.mfu and row.source in found.source and row.model in found.source


@pytest.mark.parametrize(  # what vendors print beside their tokens/s: TFLOP/s of a chip
    "chip, model, length, tokens_per_second, teraflops",
    [
        ("tpu7x", "meta-llama/Llama-3.1-70B", 8192, 2686.98, 1207.05),
        ("tpu7x", "meta-llama/Llama-3.1-70B", 131_072, 963.03, 897.94),
        ("tpu7x", "meta-llama/Llama-3.1-405B", 8192, 499.77, 1261.40),
    ],
)
def test_published_teraflops_give_the_published_tokens(chip, model, length, tokens_per_second, teraflops):
    chip = CHIPS[chip]
    row = next(row for row in PUBLISHED if (row.chip, row.model, row.length) == (chip.name, model, length))
    found = Efficiency(teraflops * 1e12 / (chip.peak_flops * chip.devices_per_chip), "")
    seconds = seconds_per_step(flops_per_token(row) * 8192, chip, chip.devices_per_chip, found)
    assert 8192 / seconds == pytest.approx(tokens_per_second, rel=1e-4)


def test_the_same_way_of_tuning_comes_before_the_nearer_size():
    found = efficiency(CHIPS["h100"], 6_738_415_616, "lora", 4096, 8)
    assert "lora tuning of Qwen/Qwen2.5-7B" in found.source
    assert "full tuning of meta-llama/Llama-2-7b-hf" in efficiency(CHIPS["h100"], 8_030_261_248, "full", 4096, 8).source


def test_where_one_way_is_not_on_file_the_other_stands_in_and_is_named():
    assert efficiency(CHIPS["v5p"], 70_553_706_496, "lora", 4096, 64).source.startswith("full tuning of meta-llama/Llama-2-70b-hf")


def test_more_devices_are_nearer_to_more_devices():
    few, many = (efficiency(CHIPS["h100"], 70_553_706_496, "lora", 4096, n) for n in (8, 32))
    assert (few.mfu, many.mfu) == (0.3261, 0.2941)


@pytest.mark.parametrize(
    "chip, parameters, routed, message",
    [
        ("v5e", 8e9, False, "a dense model of about 8B parameters on v5e.*none at all"),
        ("h100", 110e6, False, "about 0.11B parameters on h100.*there is meta-llama/Llama-3.1-8B, Qwen"),
        ("tpu7x", 47e9, True, "a mixture of experts of about 47B"),
    ],
)
def test_without_a_comparable_run_there_is_no_utilisation_and_a_reason(chip, parameters, routed, message):
    found = efficiency(CHIPS[chip], parameters, "full", 4096, 8, routed)
    assert found.mfu is None
    assert re.search(message, found.source)


def test_every_published_run_is_on_a_chip_with_a_peak():
    assert all(CHIPS[row.chip].peak_flops for row in PUBLISHED)


@pytest.mark.parametrize("name", speed.MODELS)
def test_a_model_that_was_measured_has_the_size_that_is_said(name):
    config = families.config_from(known.config(name))
    assert tree.size(network.build(config.construct(NOTHING)).abstract) == speed.MODELS[name].parameters
    assert bool(config.experts) == speed.MODELS[name].routed


def prices(tmp_path, **changes):
    raw = {"date": "2026-01-31", "currency": "EUR", "per_device_hour": {"h100": 2.5, "v5e": None}} | changes
    (tmp_path / "prices.json").write_text(json.dumps(raw))
    return tmp_path / "prices.json"


def test_a_worked_run(tmp_path):
    """1e18 FLOPs a step on 8 x 989e12 at 0.4: 0.316 s; 1,000 steps of 100,000 tokens."""
    found = estimate(1e18, 100_000, 1000, CHIPS["h100"], 8, Efficiency(0.4, "somewhere"), read_prices(prices(tmp_path)))
    seconds = 1e18 / (8 * 989e12 * 0.4)
    assert found.seconds_per_step == pytest.approx(seconds)
    assert found.tokens_per_second == pytest.approx(100_000 / seconds)
    assert found.hours == pytest.approx(1000 * seconds / 3600)
    assert found.cost == pytest.approx(8 * 2.5 * 1000 * seconds / 3600) and found.currency == "EUR"
    assert found.kilowatt_hours == pytest.approx(8 * 0.7 * 1000 * seconds / 3600)
    assert found.sources["hours"] == "somewhere"
    assert found.sources["cost"] == f"2.5 EUR per device and hour on 2026-01-31 ({tmp_path / 'prices.json'})"
    assert "700 W per device at most" in found.sources["kilowatt_hours"]


def test_what_has_no_source_is_none_and_says_why(tmp_path):
    table = read_prices(prices(tmp_path))
    none = Efficiency(None, "nobody measured it")
    found = estimate(1e18, 1e5, 10, CHIPS["v5e"], 8, none, table)
    figures = (found.seconds_per_step, found.tokens_per_second, found.hours, found.cost, found.kilowatt_hours)
    assert figures == (None,) * 5
    assert found.sources["seconds_per_step"] == "nobody measured it"
    assert found.sources["cost"] == f"no price for v5e in {tmp_path / 'prices.json'}"
    assert found.sources["kilowatt_hours"] == "no power of v5e is on file"
    assert estimate(1e18, 1e5, 10, CHIPS["h100"], 8, none, table).sources["cost"] == "nobody measured it"
    timed = estimate(1e18, 1e5, 10, CHIPS["h100"], 8, Efficiency(0.4, ""))
    assert timed.hours and timed.cost is None and timed.currency is None and timed.sources["cost"] == "no price table was given"
    assert estimate(1e18, 1e5, 10, CHIPS["cpu"], 1, Efficiency(0.4, "")).sources["hours"] == "cpu has no peak on file"


def test_every_figure_has_a_word_on_its_source():
    found = estimate(1e18, 1e5, 10, CHIPS["h100"], 8, Efficiency(0.4, "x"))
    assert set(found.sources) == set(vars(found)) - {"sources", "currency"}


def test_the_price_table_that_is_shipped_has_every_chip_and_no_price():
    table = read_prices(TEMPLATE)
    assert set(table.per_device_hour) == set(CHIPS)
    assert {*table.per_device_hour.values(), table.date, table.currency} == {None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"per_device_hour": {"h1000": 1.0}}, "h1000.*Did you mean h100"),
        ({"per_device_hour": {"h100": "2.5"}}, "price of h100 is '2.5'"),
        ({"per_device_hour": {"h100": -1}}, "at least 0"),
        ({"per_device_hour": {"h100": math.nan}}, "at least 0"),
        ({"per_device_hour": {"h100": True}}, "True"),
        ({"currency": None}, "currency=None.*there are prices"),
        ({"date": None}, "date=None must be the day"),
        ({"date": "January"}, "date='January'"),
        ({"prices": {}}, "prices is not a key"),
        ({"per_device_hour": [2.5]}, r"per_device_hour=\[2.5\] must be an object"),
    ],
)
def test_a_mistake_in_a_price_table_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_prices(prices(tmp_path, **changes))


def test_a_price_table_without_a_key_is_refused(tmp_path):
    (tmp_path / "prices.json").write_text('{"date": "2026-01-31", "per_device_hour": {}}')
    with pytest.raises(ValueError, match="currency is missing"):
        read_prices(tmp_path / "prices.json")
    with pytest.raises(ValueError, match="no such price table"):
        read_prices(tmp_path / "others.json")


def ran(tmp_path, kind, mfus):
    """A run's directory, as far as its speed goes."""
    (tmp_path / "provenance.json").write_text(json.dumps({"devices": {"kind": kind, "count": 8}}))
    lines = [{"step": 0, "eval/loss": 1.0}, *({"step": 10 * (i + 1), "time/mfu": x} for i, x in enumerate(mfus))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_of_ours_is_a_source(tmp_path):
    found = speed.measured(ran(tmp_path, "NVIDIA H200", [0.05, 0.40, 0.41, 0.30]), CHIPS["h200"])
    assert found == Efficiency(0.40, f"{tmp_path}: median of 3 lines, 8 x NVIDIA H200")


def test_a_run_that_is_too_short_or_without_a_peak_says_nothing(tmp_path):
    assert speed.measured(ran(tmp_path, "NVIDIA H200", [0.05]), CHIPS["h200"]).mfu is None
    found = speed.measured(ran(tmp_path, "cpu", []), CHIPS["cpu"])
    assert found.mfu is None and "cpu has no peak" in found.source


def test_a_run_on_another_chip_or_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8 x TPU v4, which tells nothing of h200"):
        speed.measured(ran(tmp_path, "TPU v4", [0.1, 0.2]), CHIPS["h200"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a run's directory"):
        speed.measured(tmp_path / "empty", CHIPS["h200"])
