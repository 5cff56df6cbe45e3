"""A run again from its directory: the same run, or what is different about it."""

import json
import shutil

import pytest

import tuning
from tests import runs
from tuning.__main__ import main
from tuning.sweep import reproduce
from tuning.training import provenance, writer


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A finished run on data of its own."""
    root = tmp_path_factory.mktemp("reproduced")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(home / name, root / name)
    data = {"train": {"path": str(root / "train.jsonl"), "length": 32}, "eval": {"path": str(root / "eval.jsonl")}}
    tuning.train(runs.config(home, data=data, seed=5, train__steps=4, eval__every=2, mesh={"data": 8}), root / "run")
    return root / "run"


def change(run, to, **facts):
    """A copy of the run with other provenance; keys with `__` for the dots."""
    from tuning.core import config as configs

    shutil.copytree(run, to)
    provenance = json.loads((to / "provenance.json").read_text())
    for key, value in facts.items():
        configs.put(provenance, key.replace("__", "."), value)
    (to / "provenance.json").write_text(json.dumps(provenance))
    return to


def test_a_run_is_made_again_from_its_directory(run, tmp_path, capsys, monkeypatch):
    checkout = {"commit": "abc", "dirty": False}
    monkeypatch.setattr(provenance, "_git", lambda file: checkout)
    run = change(run, tmp_path / "run", git=checkout)
    assert main(["reproduce", str(run), f"--workdir={tmp_path / 'new'}"]) == 0
    said = capsys.readouterr().out
    assert "seed 5; data as recorded: train " in said and f"Nothing differs from what {run} recorded." in said
    assert f"The same run: all 7 lines of metrics that {run} has are equal." in said
    config, again = (json.loads((path / "config.json").read_text()) for path in (run, tmp_path / "new"))
    assert again == config and again["seed"] == 5
    assert writer.comparable(tmp_path / "new" / "metrics.jsonl") == writer.comparable(run / "metrics.jsonl")


def test_what_differs_from_the_recorded_environment_is_said(run, tmp_path, capsys):
    old = change(
        run,
        tmp_path / "old",
        packages__jax="0.4.1",
        packages__gone="1.0",
        devices__count=1,
        git={"commit": "abc", "dirty": True},
        python="3.9",
    )
    config = json.loads((old / "config.json").read_text())
    del config["log"]
    (old / "config.json").write_text(json.dumps(config))
    assert main(["reproduce", str(old), "--dry_run"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    import jax

    assert {
        f"packages.jax: 0.4.1 then, {jax.__version__} now", "packages.gone: 1.0 then, absent now", "devices.count: 1 then, 8 now",
        "config.log.to: not known then, ['tensorboard'] now", "git: the recorded checkout had changes that no commit holds",
    } <= set(lines)  # fmt: skip
    assert [line.split(":")[0] for line in lines[2:]].count("python") == 1 and not any(line.startswith("time") for line in lines)


def test_other_data_are_refused_before_anything_is_trained(run, tmp_path, capsys):
    other = change(run, tmp_path / "other", data__eval="0" * 64)
    assert main(["reproduce", str(other), f"--workdir={tmp_path / 'new'}"]) == 2
    assert "data.eval has changed since" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_config_of_another_version_is_refused_and_its_commit_named(run, tmp_path):
    old = change(run, tmp_path / "old", git={"commit": "abc123", "dirty": False})
    config = json.loads((old / "config.json").read_text())
    config["method"]["forgotten"] = 1
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Unknown config key method\.forgotten.* was trained with tuning 0\.1\.0, commit abc123\."):
        reproduce.recipe(old)


def test_the_first_step_that_is_not_the_same_is_named(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    lines = writer.read(again / "metrics.jsonl")
    lines[0]["time/eval_seconds"] = -1.0  # varies from run to run
    lines[4]["train/loss"] *= 1.25
    lines[5]["train/grad_norm"] *= 2
    (again / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = reproduce.verdict(run, again)
    assert found.lines == 4
    was = writer.read(run / "metrics.jsonl")[4]["train/loss"]
    assert found.unequal == (
        f"At step 3, train/loss was {was} and is {was * 1.25}. Farthest off is train/grad_norm at step 4, by 5.0e-01 of its size."
    )


def test_a_run_that_was_stopped_is_compared_as_far_as_it_came_and_a_shorter_one_is_not_the_same(run, tmp_path):
    shorter = tmp_path / "shorter"
    shutil.copytree(run, shorter)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (shorter / "metrics.jsonl").write_text("".join(lines[:3]))
    assert reproduce.verdict(shorter, run) == reproduce.Verdict(3, "")
    assert reproduce.verdict(run, shorter) == reproduce.Verdict(3, f"{run} has 7 lines of metrics, {shorter} has 3.")


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "needs --workdir=DIR for the new run, or --dry_run"),
        (("--workdir={run}",), "is the run itself"),
        (("--dry_run", "--workdir={run}/x"), ""),
    ],
)
def test_a_reproduction_needs_a_directory_of_its_own(run, capsys, args, message):
    status = main(["reproduce", str(run), *(arg.format(run=run) for arg in args)])
    assert status == (2 if message else 0) and message in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_refused(home, capsys):
    assert main(["reproduce", str(home / "model"), "--dry_run"]) == 2
    assert "is not a run's directory" in capsys.readouterr().err
