"""Whole runs: what they leave behind, and that a run which was stopped is the same run as one which was not."""

import inspect
import json
import signal
import time

import jax
import pytest

import tuning
from tests import runs
from tuning.core import tree
from tuning.methods import METHODS
from tuning.training import loop, writer
from tuning.training.guard import Interrupted


@pytest.fixture(scope="module")
def straight(home, tmp_path_factory):
    """(directory, final measures) of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("straight") / "run"
    return path, tuning.train(runs.config(home), path)


def test_a_run_leaves_its_directory_behind(straight):
    path, final = straight
    config, provenance = (json.loads((path / name).read_text()) for name in ("config.json", "provenance.json"))
    assert config["method"].items() >= {"name": "lora", "rank": 4, "alpha": 32.0, "dropout": 0.1, "targets": ["all"]}.items()
    assert config["method"].keys() == {"name", *list(inspect.signature(METHODS["lora"]).parameters)[1:]}  # defaults too
    assert provenance["packages"]["jax"] == jax.__version__ and set(provenance["data"]) == {"train", "eval"}
    lines = writer.read(path / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]
    expected = {"train/loss", "train/grad_norm", "train/learning_rate", "time/tokens_per_second"}
    assert expected <= set(lines[1]) and "time/mfu" not in lines[1]  # a CPU's peak is not known
    assert list((path / "tensorboard").glob("events*")) and (path / "checkpoints" / "6").is_dir()
    assert final["eval/loss"] < lines[0]["eval/loss"] and final["step"] == 6
    (said,) = map(json.loads, (path / "texts.jsonl").open())
    assert said["name"] == "summary" and said["step"] == 0 and "trainable params: " in said["text"]


class Crash(BaseException):
    """Nothing in the project catches it."""


def crash_at(step, monkeypatch):
    """The process dies in the middle of a step: nothing after it runs."""
    original = loop.Clock.tick

    def tick(self, now, means):
        if now == step:
            raise Crash
        original(self, now, means)

    monkeypatch.setattr(loop.Clock, "tick", tick)


@pytest.mark.parametrize("kills", [(1,), (4,), (5, 6)], ids=str)
def test_a_run_that_was_killed_is_the_same_run(home, straight, tmp_path, monkeypatch, kills):
    for step in kills:
        with monkeypatch.context() as patch:
            crash_at(step, patch)
            with pytest.raises(Crash):
                tuning.train(runs.config(home), tmp_path / "run")
    final = tuning.train(runs.config(home), tmp_path / "run")
    assert writer.comparable(tmp_path / "run" / "metrics.jsonl") == writer.comparable(straight[0] / "metrics.jsonl")
    assert final["eval/loss"] == straight[1]["eval/loss"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_got_a_signal_goes_on_as_if_it_had_not(home, tmp_path, number):
    file = runs.write_config(tmp_path / "config.py", runs.config(home, train__steps=60, train__log_every=2, checkpoint__every=5))
    command = ("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    process = runs.start(*command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 14' in metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), out
    assert number == signal.SIGKILL or "the state is saved" in out
    config = runs.config(home, train__steps=60, train__log_every=2, checkpoint__every=5)
    tuning.train(config, tmp_path / "run")
    tuning.train(config, tmp_path / "other")
    assert writer.comparable(metrics) == writer.comparable(tmp_path / "other" / "metrics.jsonl")


def test_a_signal_in_the_same_process_saves_the_step_it_is_in(home, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Guard, "stops", lambda self, step: signal.SIGTERM if step == 5 else None)
        with pytest.raises(Interrupted, match=r"Stopped at step 5 by SIGTERM"):
            tuning.train(runs.config(home), tmp_path / "run")
    tuning.train(runs.config(home), tmp_path / "run")
    assert writer.comparable(tmp_path / "run" / "metrics.jsonl") == writer.comparable(straight[0] / "metrics.jsonl")


def test_a_run_does_not_go_on_with_other_data(home, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_bytes((home / "train.jsonl").read_bytes())
    tuning.train(runs.config(home, train__steps=3, data__train__path=str(data)), tmp_path / "run")
    data.write_text(data.read_text().replace("cat", "cow"))
    with pytest.raises(ValueError, match=r"data\.train has changed since"):
        tuning.train(runs.config(home, train__steps=3, data__train__path=str(data)), tmp_path / "run")


def test_two_processes_in_one_directory_are_refused(home, tmp_path):
    from tuning.training import workdir

    with workdir.claim(tmp_path, {}), pytest.raises(ValueError, match="in use by another run"):
        workdir.claim(tmp_path, {})


def test_the_best_checkpoint_is_kept_and_the_run_stops_when_nothing_improves(home, tmp_path):
    config = runs.config(
        home, optimizer__learning_rate=3.0, optimizer__schedule={"name": "constant"}, eval={"every": 1, "patience": 2}, train__steps=20
    )
    final = tuning.train(config, tmp_path / "run")
    assert final["step"] < 20 and final["best/eval/loss"] < final["eval/loss"]
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert len(kept) == 2 and kept[-1] == final["step"]
    best, last = (tuning.load(tmp_path / "run", checkpoint=which) for which in ("best", "last"))
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), best.params, last.params)
    assert any(tree.flatten(differ).values())


def test_the_train_step_is_compiled_once(home, tmp_path, monkeypatch):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    counts = []
    original = loop.Clock.tick
    monkeypatch.setattr(loop.Clock, "tick", lambda self, step, means: (counts.append(len(compiled)), original(self, step, means)))
    tuning.train(runs.config(home, train__steps=12), tmp_path / "run")
    # After the first evaluation and the first checkpoint nothing is compiled any more.
    assert len(counts) == 12 and counts[3] == counts[-1]


def test_data_that_makes_the_loss_infinite_stops_the_run_and_keeps_what_was_saved(home, tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match=r"Step \d: the loss .* is not finite"):
        config = runs.config(home, optimizer={"name": "sgd", "learning_rate": 1e30}, train__clip_norm=0.0, train__steps=6)
        tuning.train(config, tmp_path / "run")


def test_two_processes_train_the_same_run(home, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = runs.config(home)
    file = runs.write_config(tmp_path / "config.py", config)
    command = ("train", f"--config={file}", f"--workdir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{port}", "--processes=2")
    processes = [runs.start(*command, f"--process={i}", count=4) for i in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    tuning.train(config, tmp_path / "one")
    two, one = (writer.comparable(tmp_path / name / "metrics.jsonl") for name in ("run", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert two[0]["eval/loss"] == pytest.approx(one[0]["eval/loss"], rel=1e-6)


def test_another_config_is_refused_and_more_steps_are_not(home, straight):
    path, _ = straight
    with pytest.raises(ValueError, match=r"holds another run: method\.rank: 8 here, 4 there"):
        tuning.train(runs.config(home, method__rank=8), path)
    final = tuning.train(runs.config(home), path)
    assert final["step"] == 6 and final["eval/loss"] == straight[1]["eval/loss"]
    assert not [line for line in writer.read(path / "metrics.jsonl") if line["step"] > 6]
    tuning.train(runs.config(home, train__steps=8), path)
    assert [line["step"] for line in writer.read(path / "metrics.jsonl") if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
