"""Comparisons of runs: what is one row, what is in no mean, what is tested, and how it is written."""

import csv
import io
import json
import math

import pytest
from scipy import stats

from tests.sweep import fake_runs
from tests.sweep.fake_runs import IA3, LORA
from tuning.__main__ import main
from tuning.sweep import compare, curves, runs, states, tables
from tuning.sweep.statistics import PairedTest


def compared(root, **given):
    return compare.compare(runs.find([root])[0], **given)


@pytest.fixture
def root(tmp_path):
    """Two methods at two learning rates with three seeds each."""
    fake_runs.seeds(tmp_path, "lora", LORA, [1.0, 1.2, 1.1])
    fake_runs.seeds(tmp_path, "lora,fast", LORA, [2.0, 2.2, 2.4], optimizer__learning_rate=0.1)
    fake_runs.seeds(tmp_path, "ia3", IA3, [1.5, 1.9, 1.7])
    fake_runs.seeds(tmp_path, "ia3,fast", IA3, [1.4, 1.6, 1.3], optimizer__learning_rate=0.1)
    return tmp_path


def test_runs_that_differ_in_the_seed_alone_are_one_row(root):
    c = compared(root)
    assert [(compare.label(row.settings, c.keys), len(row.counted)) for row in c.rows] == [
        ("method=lora, learning_rate=0.01", 3), ("method=ia3, learning_rate=0.1", 3),
        ("method=ia3, learning_rate=0.01", 3), ("method=lora, learning_rate=0.1", 3),
    ]  # fmt: skip
    best = c.rows[0].summary
    assert best.mean == pytest.approx(1.1) and best.error == pytest.approx(0.1 / math.sqrt(3))
    assert c.rows[0].test is None and c.against == c.rows[0].settings
    for row, ours in zip(c.rows[1:], ([1.4, 1.6, 1.3], [1.5, 1.9, 1.7], [2.0, 2.2, 2.4]), strict=True):
        assert row.test.p == pytest.approx(stats.ttest_rel(ours, [1.0, 1.2, 1.1]).pvalue, rel=1e-9)
    ps = sorted(row.test.p for row in c.rows[1:])
    assert min(row.test.adjusted for row in c.rows[1:]) == pytest.approx(3 * ps[0])


def test_what_follows_from_something_else_or_changes_nothing_is_no_column(tmp_path):
    for seed, (rank, length) in enumerate([(4, 32), (8, 64), (8, 32)]):
        data = {"train": {"length": length, "path": "a"}, "eval": {"length": length, "path": "b"}}
        settings = fake_runs.config(LORA, 0, method__rank=rank, data=data, checkpoint={"every": seed}, log={"to": [str(seed)]})
        settings["eval"] |= {"prompts": [str(seed)], "batch_size": seed}
        fake_runs.write(tmp_path / str(seed), settings, fake_runs.lines([1.0, 1.0, 1.0]))
    fake_runs.write(tmp_path / "ia3", fake_runs.config(IA3, 0, data=data), fake_runs.lines([1.0, 1.0, 1.0]))
    assert compared(tmp_path).keys == {
        "method.name": "method", "method.rank": "rank", "data.train.length": "length",
    }  # fmt: skip


def test_short_names_stay_apart():
    keys = ["method.name", "optimizer.schedule.name", "data.train.path", "data.eval.path", "method.rank"]
    assert list(compare.short(keys).values()) == ["method", "schedule", "train.path", "eval.path", "rank"]


def test_a_later_version_knows_more_keys_and_that_is_no_difference(tmp_path):
    for seed, more in ((0, {}), (1, {"method__dora": False})):
        fake_runs.write(tmp_path / str(seed), fake_runs.config(LORA, seed, **more), fake_runs.lines([1.0, 1.0, 1.0 + seed]))
    c = compared(tmp_path)
    assert len(c.rows) == 1 and c.rows[0].summary.mean == 1.5


def test_runs_that_did_not_come_to_their_end_are_named_and_in_no_mean(root):
    add = lambda name, seed, lines, **changes: fake_runs.write(root / name, fake_runs.config(LORA, seed, **changes), lines)  # noqa: E731
    add("stopped", 3, fake_runs.lines([3.0, 9.0]))
    add("unborn", 4, [])
    add("nan", 5, fake_runs.lines([3.0, 9.0, None]))
    add("unevaluated", 6, [{"step": 20, "train/loss": 9.0}])
    add("last evaluation missing", 7, [*fake_runs.lines([3.0, 9.0]), {"step": 20, "train/loss": 1.0}])
    add("twin", 0, fake_runs.lines([3.0, 2.5, 9.0]), checkpoint__every=7)
    c = compared(root)
    assert {run.name: why for run, why in c.left} == {
        "stopped": "unfinished: step 10 of 20",
        "unborn": "unfinished: step 0 of 20",
        "nan": "eval/loss is not finite at step 20",
        "unevaluated": "has no eval/loss",
        "last evaluation missing": "unfinished: step 20 of 20",
        "twin": "is the same run as lora,seed=0, seed and all; counted once",
    }
    assert c.rows[0].summary.mean == pytest.approx(1.1) and (len(c.rows[0].counted), len(c.rows[0].every)) == (3, 9)
    said = "\n".join(tables.notes(c))
    assert "6 of 18 runs are in no mean:" in said and "  nan: eval/loss is not finite at step 20" in said
    assert tables.tables(c)[0].rows[0][2] == "3 of 9"


def test_a_run_that_stopped_early_is_finished(tmp_path):
    settings = fake_runs.config(LORA, 0, eval__patience=2, train__steps=100)
    fake_runs.write(tmp_path / "early", settings, fake_runs.lines([3.0, 1.0, 1.5, 1.25]))
    fake_runs.write(tmp_path / "going", {**settings, "seed": 1}, fake_runs.lines([3.0, 1.0, 1.5]))
    c = compared(tmp_path)
    assert c.rows[0].values == {0: 1.25} and [run.name for run, _ in c.left] == ["going"]
    assert next(run for run in c.runs if run.name == "early").note == "stopped early, at step 30 of 100"


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    path = fake_runs.write(tmp_path / "a", fake_runs.config(LORA, 0), fake_runs.lines([3.0, 2.0]))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "eval/lo')
    (run,), _ = runs.find([path])
    assert run.state == runs.UNFINISHED and run.lines[-1]["step"] == 10


def test_of_a_section_the_best_settings_are_compared(root):
    c = compared(root, by="method")
    assert [(row.settings, row.chosen) for row in c.best] == [
        ({"method.name": "lora", "optimizer.learning_rate": 0.01}, 2), ({"method.name": "ia3", "optimizer.learning_rate": 0.1}, 2),
    ]  # fmt: skip
    assert c.best[1].test.adjusted == c.best[1].test.p == pytest.approx(stats.ttest_rel([1.4, 1.6, 1.3], [1.0, 1.2, 1.1]).pvalue, rel=1e-9)
    assert [row.test for row in c.rows] == [None] * 4
    assert compared(root, by="method.name").best == c.best


def test_a_lucky_survivor_is_not_the_best(root):
    """Of the fast runs two failed: the third alone does not stand for the setting."""
    for seed in (0, 2):
        (root / f"ia3,fast,seed={seed}" / "metrics.jsonl").write_text("")
    (root / "ia3,fast,seed=1" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in fake_runs.lines([3.0, 2.5, 0.1])))
    assert [row.settings["optimizer.learning_rate"] for row in compared(root, by="method").best] == [0.01, 0.01]
    c = compared(root)
    assert c.rows[0].values == {1: 0.1} and c.against == {"method.name": "lora", "optimizer.learning_rate": 0.01}
    assert c.rows[0].test == PairedTest(1, pytest.approx(0.1 - 1.2))


def test_another_row_can_be_compared_with(root):
    c = compared(root, against="method=ia3, learning_rate=0.1")
    assert [row.test is None for row in c.rows] == [False, True, False, False]
    assert c.rows[0].test.difference == pytest.approx(1.1 - 1.4333333)


def test_the_goal_and_the_value_that_counts_can_be_chosen(tmp_path):
    for name, values in (("a", [0.1, 0.9, 0.5]), ("b", [0.1, 0.2, 0.6])):
        lines = [{"step": 10 * i, "eval/loss": 1.0, "eval/accuracy": x, "eval/odd": x} for i, x in enumerate(values)]
        fake_runs.write(tmp_path / name, fake_runs.config(LORA, 0, method__rank=name), lines)
    first = lambda **given: compared(tmp_path, **given).rows[0].settings["method.rank"]  # noqa: E731
    assert first(metric="eval/accuracy") == "b" and first(metric="eval/accuracy", at="best") == "a"
    assert first(metric="eval/odd", goal="min") == "a"
    with pytest.raises(ValueError, match=r"Is a low eval/odd good or bad\? Set --goal"):
        first(metric="eval/odd")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"metric": "eval/los", "goal": "min"}, r"No run has a metric 'eval/los'\. Did you mean eval/loss\?"),
        ({"by": "metod"}, r"--by=metod is no key or section .* Did you mean method\?"),
        ({"by": "train"}, r"--by=train: all runs have the same\. What differs: method\.name, optimizer\.learning_rate\."),
        ({"against": "method=lora"}, r"--against=method=lora is not one of: method=lora, learning_rate=0\.01; "),
        ({"at": "first"}, "last or best"),
    ],
)
def test_what_no_run_has_is_refused(root, given, message):
    with pytest.raises(ValueError, match=message):
        compared(root, **given)


def test_what_a_run_cost_is_counted_from_its_lines(root):
    (run,), _ = runs.find([root / "lora,seed=0"])
    # 20 steps of 0.5 s and 100 tokens, three evaluations of 2 s, a peak that grows by 1 GiB
    assert runs.cost(run) == runs.Cost(20, 2000.0, 16.0, 3.0, 1234)
    assert compared(root).rows[0].cost == runs.Cost(20.0, 2000.0, 16.0, 3.0, 1234.0)
    assert "240 steps, 24,000 tokens, 192 seconds" in tables.notes(compared(root))[1]


def test_of_a_program_that_several_runs_share_each_costs_its_share(tmp_path):
    lines = [line | {"time/runs_sharing": 4} for line in fake_runs.lines([3.0, 2.5, 1.0])]
    (run,), _ = runs.find([fake_runs.write(tmp_path / "a", fake_runs.config(LORA, 0), lines)])
    assert runs.cost(run) == runs.Cost(20, 2000.0, 4.0, 3.0, None)


def test_a_sweep_tells_of_runs_that_failed_or_never_began(root):
    (root / "sweep").mkdir()
    (root / "sweep" / "sweep.json").write_text("{}")
    (root / "sweep" / "configs").mkdir()
    standing = {
        "failed": (states.State(states.FAILED, error="FloatingPointError: Step 7"), [3.0]),
        "pruned": (states.State(states.PRUNED), [3.0, 9.0, 9.0]), "waiting": (states.State(), None),
    }  # fmt: skip
    for seed, (name, (state, losses)) in enumerate(standing.items()):
        settings = fake_runs.config(LORA, 10 + seed)
        (root / "sweep" / "configs" / f"{name}.json").write_text(json.dumps(settings))
        if losses is not None:
            fake_runs.write(root / "sweep" / "runs" / name, settings, fake_runs.lines(losses))
            (root / "sweep" / "states").mkdir(exist_ok=True)
            (root / "sweep" / "states" / f"{name}.json").write_text(json.dumps({"state": state.state, "error": state.error}))
    expected = {
        "failed": "failed: FloatingPointError: Step 7 (step 0 of 20)", "pruned": "pruned: by the search (step 20 of 20)",
        "waiting": "waiting: step 0 of 20",
    }  # fmt: skip
    told = lambda c: {run.path.name: why for run, why in c.left}  # noqa: E731
    assert told(compared(root)) == expected
    chosen, _ = runs.find([root / "lora,seed=0", root / "sweep" / "runs" / "pruned"])
    assert told(compare.compare(chosen)) == {"pruned": expected["pruned"]}


def test_directories_without_runs_are_told_and_alone_refused(root, tmp_path):
    (tmp_path / "empty").mkdir()
    assert runs.find([root / "ia3,seed=0", tmp_path / "empty"])[1] == [tmp_path / "empty"]
    with pytest.raises(ValueError, match="There is no run in"):
        runs.find([tmp_path / "empty"])


def test_csv_has_the_numbers_in_full(root):
    c = compared(root, by="method")
    first, second = csv.DictReader(io.StringIO(tables.csv(c)))
    assert (first["method.name"], first["n"], first["runs"], first["settings_tried"], first["p"]) == ("lora", "3", "3", "2", "")
    assert float(second["mean"]) == c.best[1].summary.mean and float(second["p_holm"]) == c.best[1].test.adjusted
    lines = list(csv.DictReader(io.StringIO(tables.runs_csv(c))))
    assert len(lines) == 12 and {line["run"]: line["eval/loss"] for line in lines}["ia3,seed=1"] == "1.9"


def test_markdown_and_latex_hold_what_stands_in_a_setting(tmp_path):
    for seed, name in enumerate(["a|b_c", "50% & $x$ {<b>}"]):
        fake_runs.write(tmp_path / str(seed), fake_runs.config(LORA, 0, method__rank=name), fake_runs.lines([3.0, 2.0, 1.0 + seed]))
    c = compared(tmp_path)
    lines = tables.markdown(c).splitlines()
    assert lines[2].count(" | ") == 7 and lines[3].startswith("| --- | ---: |")
    assert lines[4].startswith(r"| a\|b\_c | 1 | 1.0000 | – | – | – | – | – |")
    latex = tables.latex(c)
    assert r"50\% \& \$x\$ \{\textless{}b\textgreater{}\} & 1 & 2.0000 & -- &" in latex
    assert r"\begin{tabular}{lrrrrrrr}" in latex and "No p values" in latex


def test_a_curve_is_the_mean_of_the_same_runs_at_every_step(tmp_path):
    for seed, losses in enumerate([[3.0, 2.0, 1.0], [3.0, 1.0]]):
        fake_runs.write(tmp_path / str(seed), fake_runs.config(LORA, seed), fake_runs.lines(losses))
    found = curves.curve(runs.find([tmp_path])[0], "eval/loss")
    assert (found.steps, found.means, found.errors) == ([0, 10], [3.0, 1.5], [0.0, 0.5])


def test_the_command_prints_and_writes_everything(root, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["compare", str(root), "--by=method", f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "the best settings by method" in said and "all settings" in said and "+0.333 (3)" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.csv", "comparison.html", "comparison.md", "comparison.tex", "eval_loss.png", "runs.csv", "train_loss.png",
    ]  # fmt: skip
    assert (out / "eval_loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(root), "--format=csv"]) == 0
    assert capsys.readouterr().out.startswith("method.name,optimizer.learning_rate,metric,n,")
    assert main(["compare", str(root), "--by=metod"]) == 2


def test_without_matplotlib_the_rest_is_written_and_the_extra_named(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curves, "drawable", lambda: False)
    assert main(["compare", str(root), f"--out={tmp_path / 'out'}"]) == 0
    assert "pip install 'tuning[report]'" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png")) and (tmp_path / "out" / "comparison.html").exists()
