"""A sweep's plan: every run's config checked before anything starts, written once, and the same when it is gone on with."""

import dataclasses
import json

import pytest

from tests import runs
from tuning import api, build
from tuning.cli import flags
from tuning.core import config as configs
from tuning.plan import cost
from tuning.sweep import sweep
from tuning.sweep.space import chain, choice, grid, log_uniform, product, seeds, when
from tuning.sweep.sweep import Sweep


@pytest.fixture
def make(home):
    return lambda space, **more: Sweep(runs.config(home), space, **more)


def resolved(made):
    return sweep.resolve(sweep.plan(made))


def test_a_run_has_the_common_config_with_its_point_and_a_changed_name_resets_its_section(make, home):
    space = chain(
        grid({"method.name": ["lora"], "method.rank": [4, 8]}), product(choice("method.name", "ia3"), seeds(2), grid({"train.steps": [3]}))
    )
    found = resolved(make(space))
    assert list(found) == ["lora,rank=4", "lora,rank=8", "ia3,seed=0", "ia3,seed=1"]
    common = build.resolve(runs.config(home))
    assert configs.plain(found["lora,rank=8"]) == configs.plain({**common, "method": common["method"] | {"rank": 8}})
    other = found["ia3,seed=1"]
    assert other["method"]["name"] == "ia3" and "dropout" not in other["method"]
    assert (other["seed"], other["train"]["steps"], other["optimizer"]) == (1, 3, common["optimizer"])


MISTAKES = {
    "unknown key": (grid({"method.rnak": [4]}), r"Run rnak=4: Unknown config key method\.rnak\. Did you mean rank\?"),
    "unknown section": (grid({"optimiser.learning_rate": [1.0]}), r"Unknown config key config\.optimiser\. Did you mean optimizer\?"),
    "another tool's key": (grid({"optimizer.lr": [1.0, 2.0]}), r"Run lr=1: Unknown config key optimizer\.lr\. Did you mean"),
    "a key of another part": (grid({"method.name": ["lora", "ia3"], "method.rank": [4]}), r"Run ia3: Unknown config key method\.rank"),
    "unknown part": (choice("method.name", "lorra"), r"method\.name='lorra' is not one of .* Did you mean lora\?"),
    "a whole section": (choice("optimizer.schedule", {"name": "cosine"}), r"optimizer\.schedule is no key with a value"),
    "text for a number": (choice("method.rank", 4, "8"), r"Run rank=8: method\.rank='8' is not of type int"),
    "a fraction for a whole": (choice("train.steps", 2.5), r"train\.steps=2\.5 is not of type int"),
    "a truth for a number": (choice("optimizer.learning_rate", True), r"learning_rate=True is not of type float"),
    "a number for a truth": (choice("data.train.pack", 1), r"data\.train\.pack=1 is not of type bool"),
    "a word for a tuple": (choice("method.targets", "all"), r"method\.targets='all' is not of type tuple"),
    "a seed that is none": (choice("seed", 0, 1.5), r"seed=1\.5 is not of type int"),
    "the same run twice": (chain(grid({"method.rank": [4]}), grid({"seed": [0]})), r"rank=4 and seed=0 are the same run"),
    "a domain": (log_uniform("optimizer.learning_rate", 1e-5, 1e-3), r"optimizer\.learning_rate takes any number"),
    "a condition on nothing": (when("method.name", "lora", seeds(2)), r"has no method\.name before it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_any_run_is_found_before_anything_is_built(mistake, make):
    space, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        resolved(make(space))


def test_whole_numbers_stand_for_floats_and_lists_for_tuples(make):
    found = resolved(make(grid({"optimizer.learning_rate": [1, 2], "method.targets": [["attn/q"]]})))
    assert [config["optimizer"]["learning_rate"] for config in found.values()] == [1, 2]


DEEP = {
    "an optimizer of a later run": (grid({"optimizer.learning_rate": [1e-3, -1.0]}), r"Run learning_rate=-1: .*negative"),
    "what decays": (
        grid({"optimizer.decay": ["qq"], "optimizer.weight_decay": [0.0, 0.1]}),
        r"Run weight_decay=0\.1: .*decay='qq' matches none",
    ),
    "a schedule": (grid({"optimizer.schedule.warmup_steps": [0, 60]}), r"Run warmup_steps=60: .*warmup"),
    "data": (choice("data.train.path", "/nowhere/x.jsonl"), r"Run path=x\.jsonl: .*/nowhere/x\.jsonl"),
    "a target": (choice("method.targets", ("all",), ("qq",)), r"Run targets=qq: .*matches no site"),
    "a batch": (choice("train.batch_size", 8, 4), r"Run batch_size=4: .*must be a multiple of 8"),
    "a mesh": (choice("mesh.fsdp", 8, 3), r"Run fsdp=3: Mesh .* needs 3 devices"),
}


@pytest.mark.parametrize("mistake", DEEP)
def test_a_mistake_in_any_part_is_found_before_anything_starts(mistake, make):
    space, message = DEEP[mistake]
    made = resolved(make(space))
    with pytest.raises(ValueError, match=message):
        sweep.costs(made, "eval/loss")


def test_a_measure_that_is_never_taken_is_refused(make, home):
    config = runs.config(home)
    config["data"]["eval"].pop("path")
    made = resolved(dataclasses.replace(make(seeds(2)), config=config))
    with pytest.raises(ValueError, match=r"eval/loss compares the runs, and data\.eval has no path"):
        sweep.costs(made, "eval/loss")
    assert len(sweep.costs(made, "train/loss")) == 2


def test_a_run_costs_what_its_steps_take(make, monkeypatch):
    built = []
    parts_of = build.parts
    monkeypatch.setattr(build, "parts", lambda config: built.append(config) or parts_of(config))
    made = resolved(make(product(grid({"method.rank": [2, 4], "optimizer.learning_rate": [1e-3, 1e-2]}), seeds(2))))
    costs = sweep.costs(made, "eval/loss")
    assert len(costs) == 8 and len(built) == 2
    four = costs["rank=4,learning_rate=0.01,seed=1"]
    assert (four.trainable, four.nbytes) == (3712, 14848)  # as `tuning train --dry_run` says
    assert costs["rank=2,learning_rate=0.01,seed=1"].trainable == 3712 // 2
    parts = parts_of(made["rank=4,learning_rate=0.01,seed=1"])
    assert four.flops == pytest.approx(cost.flops_per_token(parts) * parts.train.report.tokens / len(parts.train) * 8 * 6)


def test_a_config_comes_back_as_it_was_written(make, tmp_path):
    plan = sweep.plan(make(grid({"method.targets": [("attn/q", "attn/v"), ("all",)], "optimizer.learning_rate": [1, 1e-4]})))
    made = sweep.resolve(plan)
    sweep.write(tmp_path, plan, made)
    assert sweep.load(tmp_path).points == configs.plain(plan.points)
    for name, config in made.items():
        assert sweep.run_config(tmp_path, name) == flags.read(f"{tmp_path}/configs/{name}.json")
        again = sweep.run_config(tmp_path, name)
        assert configs.plain(again) == configs.plain(config)
        assert again["method"]["targets"] == config["method"]["targets"]
        kinds = configs.kinds(build.SECTIONS, again)
        values = configs.flat(again)
        assert all(type(values[key]) is kind for key, kind in kinds.items() if values[key] is not None)


def test_a_config_file_of_json_takes_overrides(make, tmp_path):
    plan = sweep.plan(make(seeds(2)))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    config = flags.merge(flags.read(f"{tmp_path}/configs/seed=1.json"), {"method.targets": "('attn/q',)", "train.steps": "3"})
    assert (config["method"]["targets"], config["train"]["steps"], config["seed"]) == (("attn/q",), 3, 1)


def written(path, made):
    plan = sweep.plan(made, sweep.load(path) if (path / "sweep.json").exists() else None)
    sweep.write(path, plan, sweep.resolve(plan))
    return list(plan.points)


def test_points_may_be_added_and_the_others_keep_their_names_and_configs(make, tmp_path):
    assert written(tmp_path, make(grid({"method.rank": [4, 8]}))) == ["rank=4", "rank=8"]
    first = tmp_path / "configs" / "rank=4.json"
    before = first.stat().st_mtime_ns
    grown = make(chain(grid({"method.rank": [2]}), grid({"method.rank": [4, 8]}), grid({"method.rank": [8], "seed": [1]})), retries=3)
    assert written(tmp_path, grown) == ["rank=4", "rank=8", "rank=2", "rank=8,seed=1"]
    assert first.stat().st_mtime_ns == before and sweep.load(tmp_path).retries == 3


def test_another_sweep_is_refused_with_the_difference(make, tmp_path):
    made = make(grid({"method.rank": [4, 8]}))
    written(tmp_path, made)
    with pytest.raises(ValueError, match=r"another sweep: it has the run rank=8, which is no point of this one"):
        written(tmp_path, make(grid({"method.rank": [4]})))
    with pytest.raises(ValueError, match=r"another sweep: train\.steps: 7 here, 6 there"):
        written(tmp_path, dataclasses.replace(made, config={**made.config, "train": made.config["train"] | {"steps": 7}}))
    with pytest.raises(ValueError, match=r"another sweep: goal: max here, min there"):
        written(tmp_path, make(grid({"method.rank": [4, 8]}), goal="max"))
    with pytest.raises(FileNotFoundError, match="has no sweep"):
        sweep.load(tmp_path / "nothing")


def test_a_goal_and_retries_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match="goal='less' is not one of min, max"):
        make(seeds(2), goal="less")
    with pytest.raises(ValueError, match="retries=-1 must be 0 or more"):
        make(seeds(2), retries=-1)


class Enough(Exception):  # noqa: N818
    """What a callback raises that has heard enough."""


def test_a_callback_hears_of_each_evaluation_once_it_is_saved_and_may_end_the_run(home, tmp_path):
    heard, run = [], tmp_path / "run"

    def on_eval(step, measures):
        heard.append((step, measures["eval/loss"]))
        if len(heard) == 2:
            raise Enough

    with pytest.raises(Enough):
        api.train(runs.config(home), run, on_eval=on_eval)
    assert [step for step, _ in heard] == [0, 3] and (run / "checkpoints" / "3").is_dir()
    final = api.train(runs.config(home), run, on_eval=on_eval)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert heard == [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    assert heard[2] == (6, final["eval/loss"])
