"""Claims: no run is taken twice, none is lost with its worker, and none kills workers for ever."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tuning.sweep import states

NAMES = ("a=1", "a=0.5", "b")


@pytest.fixture
def take(tmp_path):
    """Takes the next run; what a test holds is let go of after it."""
    held = []

    def take(worker="w", names=NAMES):
        claim = states.take(tmp_path, names, worker)
        if claim:
            held.append(claim)
        return claim

    yield take
    for claim in held:
        claim.close()


def standing(path, names=NAMES):
    return [state.state for state in states.survey(path, names).values()]


def test_runs_are_taken_in_order_and_each_once(tmp_path, take):
    assert [take().name, take().name, take().name, take()] == [*NAMES, None]
    assert standing(tmp_path) == ["running"] * 3
    assert states.read(tmp_path, "b").worker == "w" and states.read(tmp_path, "b").began == pytest.approx(time.time(), abs=60)


def test_what_is_done_or_pruned_is_not_taken_again(tmp_path, take):
    for _ in range(2):
        with_final = take()
        with_final.done({"step": 6, "eval/loss": 0.5, "worst": float("nan")}) if with_final.name == "a=1" else with_final.pruned(
            {"step": 3}
        )
        with_final.close()
    assert take().name == "b" and take() is None
    assert standing(tmp_path) == ["done", "pruned", "running"]
    assert states.read(tmp_path, "a=1").final == {"step": 6, "eval/loss": 0.5, "worst": None}
    assert "NaN" not in (tmp_path / "states" / "a=1.json").read_text()


def test_a_released_run_waits_and_comes_next(tmp_path, take):
    claim = take()
    began = states.read(tmp_path, claim.name).began
    claim.released()
    assert take().name == "a=0.5"  # as long as its holder has not let go of it, nobody else can have it
    claim.close()
    assert standing(tmp_path) == ["waiting", "running", "waiting"]
    assert take().name == "a=1" and states.read(tmp_path, "a=1").began == began


def test_a_failed_run_waits_for_its_retries_and_comes_after_the_others(tmp_path, take):
    taken = []
    while claim := take():
        taken.append(claim.name)
        claim.failed("OSError: gone", retries=2) if claim.name == "a=1" else claim.done({})
        claim.close()
    assert taken == ["a=1", "a=0.5", "b", "a=1", "a=1"]
    state = states.read(tmp_path, "a=1")
    assert (state.state, state.attempts, state.error) == ("failed", 3, "OSError: gone")
    assert states.again(tmp_path, NAMES) == ["a=1"] and states.read(tmp_path, "a=1").attempts == 0
    assert take().name == "a=1"


HOLD = """
import sys, time, pathlib
from tuning.sweep import states
claim = states.take(pathlib.Path(sys.argv[1]), sys.argv[2:], "dying")
print(claim.name, flush=True)
time.sleep(600)
"""


def hold(path, *names):
    """A process that has taken a run, and its name."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *names], env=runs.environment(), cwd=runs.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_run_is_waiting_from_the_moment_its_worker_is_killed(tmp_path, take):
    process, name = hold(tmp_path, "b")
    try:
        assert name == "b" and standing(tmp_path) == ["waiting", "waiting", "running"] and take(names=["b"]) is None
        process.send_signal(signal.SIGSTOP)  # it says nothing, but it is there
        assert take(names=["b"]) is None
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / "states" / "b.json").read_text())["state"] == "running"
    assert standing(tmp_path) == ["waiting"] * 3
    claim = take("other", ["b"])
    assert claim.name == "b" and states.read(tmp_path, "b").worker == "other" and states.read(tmp_path, "b").deaths == 1


def test_a_worker_of_another_host_is_dead_when_it_was_silent_for_long(tmp_path, take, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(states, "kernel", lambda: "another")
        take("far").close()
    path = tmp_path / "claims" / "a=1.1"
    assert take(names=["a=1"]) is None and standing(tmp_path)[0] == "running"
    os.utime(path, (time.time() - states.STALE - 10,) * 2)
    assert standing(tmp_path)[0] == "waiting" and take(names=["a=1"]).name == "a=1"
    assert {path.name for path in (tmp_path / "claims").iterdir()} == {"a=1.1", "a=1.2"}


def test_a_claim_that_is_just_being_made_is_not_dead(tmp_path, take):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "b.1").touch()
    assert take(names=["b"]) is None


def test_a_worker_shows_that_it_lives(tmp_path, take, monkeypatch):
    monkeypatch.setattr(states, "BEAT", 0.01)
    take()
    path = tmp_path / "claims" / "a=1.1"
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0:
        time.sleep(0.005)
    assert path.stat().st_mtime == pytest.approx(time.time(), abs=60)


def test_a_worker_that_was_taken_for_dead_ends_before_it_harms_the_one_that_has_its_run(tmp_path):
    process, _ = hold(tmp_path, "b")
    program = HOLD.replace("from tuning.sweep import states", "from tuning.sweep import states\nstates.BEAT = 0.05")
    process.kill()
    process.wait()
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "b"], env=runs.environment(), cwd=runs.ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as late:  # fmt: skip
        assert late.stdout is not None and late.stdout.readline() == "b\n"
        (tmp_path / "claims" / "b.3").touch()
        assert late.wait(60) == 1 and late.stderr is not None and "another worker has taken b over" in late.stderr.read()


def test_a_run_that_kills_its_workers_fails_unless_it_gets_further(tmp_path, take):
    for _ in range(states.LIVES + 2):  # each dies after a checkpoint of its own
        claim = take(names=["b"])
        (tmp_path / "runs" / "b" / "checkpoints" / str(states.last_saved(tmp_path / "runs" / "b") + 2)).mkdir(parents=True)
        claim.close()
    for _ in range(states.LIVES):
        take(names=["b"]).close()
    assert states.read(tmp_path, "b").deaths == states.LIVES - 1
    assert take(names=["b"]) is None
    state = states.read(tmp_path, "b")
    assert state.state == "failed" and state.error.startswith("3 workers died with it") and "the last was w" in state.error


RACE = """
import sys, pathlib, time
from tuning.sweep import states
path, worker, names = pathlib.Path(sys.argv[1]), sys.argv[2], [f"run={i}" for i in range(40)]
while not (path / "go").exists():
    time.sleep(0.001)
while claim := states.take(path, names, worker):
    with (path / "taken").open("a") as file:
        file.write(f"{claim.name} {worker}\\n")
    claim.done({})
    claim.close()
"""


def test_workers_that_race_for_runs_take_each_once(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), str(i)], env=runs.environment(), cwd=runs.ROOT) for i in range(4)
    ]
    (tmp_path / "go").touch()
    assert [process.wait(120) for process in processes] == [0] * 4
    taken = [line.split() for line in (tmp_path / "taken").read_text().splitlines()]
    counts = collections.Counter(name for name, _ in taken)
    assert set(counts) == {f"run={i}" for i in range(40)} and set(counts.values()) == {1}
    assert all(states.read(tmp_path, name).worker == worker for name, worker in taken)
