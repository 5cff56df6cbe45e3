"""A worker: what it makes of a run that ends well, badly, early or by a signal. The training itself is a stand-in here."""

import os
import signal
import socket

import pytest

from tests import runs
from tuning import api
from tuning.sweep import states, sweep, vectorized, worker
from tuning.sweep.space import seeds
from tuning.sweep.sweep import Sweep
from tuning.training import writer
from tuning.training.guard import Guard, Interrupted


@pytest.fixture
def directory(home, tmp_path):
    plan = sweep.plan(Sweep(runs.config(home), seeds(3), retries=1))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    return tmp_path


@pytest.fixture
def train(monkeypatch):
    """Sets what happens instead of training: a function of the run's seed and of the callback."""
    calls = []

    def stand_in(happens):
        def train(config, path, *, argv, on_eval):
            calls.append((config["seed"], path.name, argv))
            return happens(config["seed"], on_eval) or {"step": 6, "eval/loss": config["seed"] / 2}

        monkeypatch.setattr(api, "train", train)
        return calls

    return stand_in


def standing(directory):
    return [states.read(directory, f"seed={i}").state for i in range(3)]


def test_runs_are_made_in_order_until_none_waits(directory, train, capsys):
    calls = train(lambda seed, on_eval: None)
    assert worker.work(directory, "me") == 0
    assert calls == [
        (i, f"seed={i}", ["tuning", "train", f"--config={directory}/configs/seed={i}.json", f"--workdir={directory}/runs/seed={i}"])
        for i in range(3)
    ]
    assert standing(directory) == ["done"] * 3 and states.read(directory, "seed=2").final == {"step": 6, "eval/loss": 1.0}
    assert "No run waits." in capsys.readouterr().out
    assert worker.work(directory) == 0 and len(calls) == 3


def test_a_run_that_raises_fails_with_its_reason_and_the_others_go_on(directory, train, capsys):
    def happens(seed, on_eval):
        if seed == 0:
            raise OSError("no space left\nat all")
        if seed == 1:
            raise FloatingPointError("Step 3: the loss (nan) is not finite.")

    calls = train(happens)
    assert worker.work(directory) == 0
    assert [seed for seed, *_ in calls] == [0, 1, 2, 0]  # what would only fail in the same way is not tried again
    assert standing(directory) == ["failed", "failed", "done"]
    first, second = (states.read(directory, f"seed={i}") for i in range(2))
    assert (first.error, first.attempts, second.error) == (
        "OSError: no space left", 2, "FloatingPointError: Step 3: the loss (nan) is not finite.",
    )  # fmt: skip
    assert capsys.readouterr().out.count("Traceback (most recent call last)") == 3


def test_a_mistake_in_a_config_is_not_tried_again(directory, train):
    def happens(seed, on_eval):
        raise ValueError("data.train has changed")

    calls = train(happens)
    assert worker.work(directory) == 0
    assert len(calls) == 3 and standing(directory) == ["failed"] * 3


def test_who_hears_of_an_evaluation_may_prune_the_run(directory, train):
    def happens(seed, on_eval):
        for step in (0, 3, 6):
            on_eval(step, {"eval/loss": step + seed})

    heard = []

    def hear(name, step, measures):
        heard.append((name, step, measures["eval/loss"]))
        if name == "seed=1" and step == 3:
            raise worker.Pruned

    train(happens)
    assert worker.work(directory, heard=hear) == 0
    assert standing(directory) == ["done", "pruned", "done"]
    assert heard == [(f"seed={i}", step, step + i) for i, steps in ((0, (0, 3, 6)), (1, (0, 3)), (2, (0, 3, 6))) for step in steps]
    assert states.read(directory, "seed=1").final == {"step": 3, "eval/loss": 4}


@pytest.fixture
def pairs(home, tmp_path):
    plan = sweep.plan(Sweep(runs.config(home), seeds(4), retries=1, vectorize=2))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    return tmp_path


def test_runs_that_can_be_one_program_are_taken_together_and_each_ends_in_its_own_way(pairs, train, monkeypatch):
    asked = []

    def train_many(configs, paths, *, argv, on_eval):
        asked.append([path.name for path in paths])
        assert [f"seed={config['seed']}" for config in configs] == asked[-1]
        assert {states.read(pairs, name).state for name in asked[-1]} == {"running"}
        if len(asked) == 2:
            return [OSError("no space left"), FloatingPointError("Step 3: the loss (nan) is not finite.")]
        on_eval[0](6, {"eval/loss": 0.5})
        try:
            on_eval[1](3, {"eval/loss": 2.0})
        except worker.Pruned as pruned:
            return [{"step": 6, "eval/loss": 0.5}, pruned]

    def hear(name, step, measures):
        if measures["eval/loss"] > 1:
            raise worker.Pruned

    monkeypatch.setattr(vectorized, "train_many", train_many)
    alone = train(lambda seed, on_eval: None)
    assert worker.work(pairs, heard=hear) == 0
    assert asked == [["seed=0", "seed=1"], ["seed=2", "seed=3"]] and [seed for seed, *_ in alone] == [2]  # what failed goes on alone
    assert [states.read(pairs, f"seed={i}").state for i in range(4)] == ["done", "pruned", "done", "failed"]
    assert states.read(pairs, "seed=0").final == {"step": 6, "eval/loss": 0.5}
    assert states.read(pairs, "seed=1").final == {"step": 3, "eval/loss": 2.0}


def test_a_signal_leaves_all_runs_of_a_program_waiting(pairs, monkeypatch):
    def train_many(configs, paths, **_):
        raise Interrupted(signal.SIGTERM, 3)

    monkeypatch.setattr(vectorized, "train_many", train_many)
    assert worker.work(pairs) == 128 + signal.SIGTERM
    assert [states.read(pairs, f"seed={i}").state for i in range(4)] == ["waiting"] * 4


def test_a_sweep_in_one_program_has_the_runs_of_one_after_the_other(home, tmp_path):
    lines = {}
    for vectorize in (0, 2):
        plan = sweep.plan(Sweep(runs.config(home, train__steps=4), seeds(2), vectorize=vectorize))
        sweep.write(at := tmp_path / str(vectorize), plan, sweep.resolve(plan))
        assert worker.work(at) == 0
        assert [states.read(at, f"seed={i}").state for i in range(2)] == ["done"] * 2
        lines[vectorize] = [line for i in range(2) for line in writer.comparable(at / "runs" / f"seed={i}" / "metrics.jsonl")]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[2]]
    assert all(line[name] == pytest.approx(other[name], rel=1e-5) for line, other in zip(*lines.values(), strict=True) for name in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_steps_begin_ends_the_worker_and_the_run_waits(directory, train, number):
    before = signal.getsignal(number)
    calls = train(lambda seed, on_eval: os.kill(os.getpid(), number) if seed == 1 else None)
    assert worker.work(directory) == 128 + number
    assert standing(directory) == ["done", "waiting", "waiting"] and len(calls) == 2
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1
    train(lambda seed, on_eval: None)
    assert worker.work(directory) == 0 and standing(directory) == ["done"] * 3


def test_a_run_that_a_signal_has_stopped_waits(directory, train):
    def happens(seed, on_eval):
        raise Interrupted(signal.SIGTERM, 3)

    train(happens)
    assert worker.work(directory) == 143 and standing(directory) == ["waiting"] * 3


def test_a_signal_that_comes_too_late_for_the_run_ends_the_worker_after_it(directory, train):
    def happens(seed, on_eval):
        with Guard():  # as in the last step, after it was asked whether to stop
            os.kill(os.getpid(), signal.SIGTERM)

    calls = train(happens)
    assert worker.work(directory) == 143
    assert len(calls) == 1 and standing(directory) == ["done", "waiting", "waiting"]


def test_points_that_are_added_while_a_worker_is_busy_are_taken_too(directory, home, train):
    def happens(seed, on_eval):
        if seed == 2:
            more = sweep.plan(Sweep(runs.config(home), seeds(4), retries=1), sweep.load(directory))
            sweep.write(directory, more, sweep.resolve(more))

    calls = train(happens)
    assert worker.work(directory) == 0 and [seed for seed, *_ in calls] == [0, 1, 2, 3]


def test_two_processes_are_one_worker_and_take_the_same_runs(home, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plan = sweep.plan(Sweep(runs.config(home, train__steps=3, eval__every=0), seeds(2)))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    command = ("work", str(tmp_path), "--worker=pod", f"--coordinator=127.0.0.1:{port}", "--processes=2")
    processes = [runs.start(*command, f"--process={i}", count=4) for i in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    found = [states.read(tmp_path, f"seed={i}") for i in range(2)]
    assert [(state.state, state.worker, state.final["step"]) for state in found] == [("done", "pod", 3)] * 2
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["seed=0.1", "seed=1.1"]
    assert all("seed=1" in out and "No run waits." in out for out in outs)
