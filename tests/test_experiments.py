"""The experiments that compare methods: their runs are those of tuning.train, and what was run once is kept."""

import pytest

import tuning
from experiments.methods_on_gsm8k import run as on_gsm8k
from experiments.methods_on_sst2 import run as on_sst2
from experiments.methods_on_sst2 import trials
from experiments.methods_on_sst2.trials import Plan, Row
from tests import runs
from tuning.methods import METHODS

ROWS = (Row("lora", dict(name="lora", rank=2, alpha=2.0, b_rate=4.0), (1e-3, 1e-2)), Row("ia3", dict(name="ia3"), (1e-2, 1e-1)))


@pytest.fixture
def plan(home):
    def config(row):
        made = runs.config(home)
        del made["optimizer"]["learning_rate"]
        return {**made, "method": row.method}

    return Plan(ROWS, config, "loss", higher=False)


def test_a_run_at_a_rate_is_the_run_that_train_makes(plan, tmp_path):
    row = ROWS[0]
    config = plan.config(row)
    made = trials.program(config)
    for seed, rate in enumerate(row.rates):
        final = tuning.train({**config, "optimizer": config["optimizer"] | dict(learning_rate=rate), "seed": seed}, tmp_path / str(seed))
        assert made(rate, seed)["loss"] == pytest.approx(final["eval/loss"], rel=1e-6)
    assert abs(made(row.rates[0], 0)["loss"] - made(row.rates[1], 0)["loss"]) > 1e-4


def test_what_was_run_is_not_run_again_and_stands_in_the_table(plan, tmp_path, monkeypatch):
    asked = []

    def program(config):
        return lambda rate, seed: asked.append((config["method"]["name"], rate, seed)) or {
            "loss": abs(rate - 1e-2) + seed, "trained": 5, "bytes": 60, "temporaries": 7, "arguments": 8, "cpu_seconds": 0.5,
        }  # fmt: skip

    monkeypatch.setattr(trials, "program", program)
    trials.run(plan, tmp_path, only="lora", say=lambda text: None)
    assert asked == [("lora", 1e-3, 0), ("lora", 1e-2, 0), ("lora", 1e-2, 1), ("lora", 1e-2, 2)]
    kept = tmp_path / "runs.jsonl"
    kept.write_text(kept.read_text()[:-20])  # as if the last line had been cut short
    records = trials.run(plan, tmp_path, say=lambda text: None)
    assert asked[4:] == [("lora", 1e-2, 2), ("ia3", 1e-2, 0), ("ia3", 1e-1, 0), ("ia3", 1e-2, 1), ("ia3", 1e-2, 2)]
    lines = trials.table(plan, records, lambda x: f"{x:.3f}").splitlines()
    assert lines[2:] == [
        f"| {name} | 5 | 0.01* | 1.000 ± 1.000 | {each} | {spread} | 0.500 | 60 | 7 + 8 |"
        for name, each, spread in (("lora", "0.001: 0.009, 0.01: 0.000", "0.009"), ("ia3", "0.01: 0.000, 0.1: 0.090", "0.090"))
    ]


def test_a_loss_that_is_not_a_number_is_never_the_best(plan):
    assert plan.best([{"loss": float("nan")}, {"loss": 9.0}, {"loss": float("inf")}]) == {"loss": 9.0}


def test_every_method_has_a_row():
    there = {row.method["name"] for row in (*on_sst2.ROWS, *on_gsm8k.ROWS)}
    assert there >= set(METHODS)
    for rows in (on_sst2.ROWS, on_gsm8k.ROWS):
        assert len({row.name for row in rows}) == len(rows)
        assert all(list(row.rates) == sorted(set(row.rates)) and len(row.rates) == 4 for row in rows)
