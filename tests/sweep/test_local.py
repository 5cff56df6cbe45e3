"""The local runner: what each worker gets, what becomes of runs whose workers die, and Ctrl-C. Most workers here only pretend to train."""

import importlib
import io
import json
import os
import signal
import sys
import threading
import time
from platform import node

import pytest
from rich.console import Console

from tests import runs
from tuning.sweep import states, sweep
from tuning.sweep.board import Board
from tuning.sweep.runners import RUNNERS
from tuning.sweep.runners.local import places, present
from tuning.sweep.runners.runner import Job, bound
from tuning.sweep.space import choice, seeds
from tuning.sweep.states import State
from tuning.sweep.sweep import Sweep
from tuning.training import workdir, writer

local = importlib.import_module("tuning.sweep.runners.local")  # the room has the runner by this name


def env(**more):
    return {"JAX_PLATFORMS": "cpu", **more}


def test_cores_are_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 7})
    assert [place.ids for place in places(2, "", "", env())] == [("0", "2"), ("3", "5", "7")]
    assert [place.ids for place in places(2, "cpu", "7;0,7", {})] == [("7",), ("0", "7")]
    assert [place.environment for place in places(1, "", "", env())] == [{}]
    assert [place.environment for place in places(1, "cpu", "", {})] == [{"JAX_PLATFORMS": "cpu"}]


def test_gpus_are_shared_out_by_id_and_memory():
    found = places(2, "cuda", "", {"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert [place.environment for place in found] == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    shared = places(3, "cuda", "4;4;5", {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in shared] == ["4", "4", "5"]
    assert {place.environment["XLA_CLIENT_MEM_FRACTION"] for place in shared} == {"0.450"}
    kept = places(2, "cuda", "4;4", {"CUDA_VISIBLE_DEVICES": "4", "XLA_CLIENT_MEM_FRACTION": "0.2"})
    assert [place.environment for place in kept] == [{"CUDA_VISIBLE_DEVICES": "4"}] * 2


def test_each_worker_is_a_slice_of_tpu_chips_of_its_own():
    one, two = (place.environment for place in places(2, "tpu", "", {"TPU_VISIBLE_CHIPS": "0,1,2,3"}))
    assert (one["TPU_VISIBLE_CHIPS"], two["TPU_VISIBLE_CHIPS"]) == ("0,1", "2,3")
    assert one["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1" and one["TPU_PROCESS_BOUNDS"] == "1,1,1" and one["CLOUD_TPU_TASK_ID"] == "0"
    assert one["TPU_PROCESS_PORT"] != two["TPU_PROCESS_PORT"] and two["TPU_PROCESS_ADDRESSES"].endswith(two["TPU_PROCESS_PORT"])


def test_devices_are_found_without_starting_jax(monkeypatch):
    files = {"/dev/nvidia[0-9]*": ["/dev/nvidia3", "/dev/nvidia5"], "/dev/accel[0-9]*": [], "/dev/vfio/[0-9]*": ["/dev/vfio/0"]}
    monkeypatch.setattr(local.glob, "glob", lambda pattern: files[pattern])
    assert present("cuda", {}) == ["0", "1"] and present("tpu", {}) == ["0"] and present("cuda", {"CUDA_VISIBLE_DEVICES": ""}) == []
    there = {"jax_cuda13_plugin"}
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: name in there or None)
    assert places(2, "", "", {})[1].environment == {"CUDA_VISIBLE_DEVICES": "1"}
    there.add("libtpu")
    assert places(1, "", "", {})[0].platform == "tpu"
    assert places(1, "", "", {"JAX_PLATFORMS": "gpu,cpu"})[0].platform == "cuda" and places(1, "", "", env())[0].platform == "cpu"


NONSENSE = {
    "more workers than GPUs": ((3, "cuda", ""), r"--workers=3, and there are 2 cuda devices: 0,1"),
    "other groups than workers": ((1, "cuda", "0;1"), r"0;1 are 2 groups, and --workers=1"),
    "a GPU that is not there": ((2, "cuda", "0;2"), r"there is no cuda device '2'; there are 0,1"),
    "a platform that is none": ((1, "gpus", ""), r"cpu, cuda, tpu, not 'gpus'"),
    "a shared chip": ((2, "tpu", "0;0"), r"TPU chips of its own, not 0"),
    "three chips": ((1, "tpu", "0,1,2"), r"A worker has 1, 2, 4, 8 TPU chips"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_cannot_be_shared_out_is_refused(what):
    given, message = NONSENSE[what]
    with pytest.raises(ValueError, match=message):
        places(*given, {"CUDA_VISIBLE_DEVICES": "0,1", "TPU_VISIBLE_CHIPS": "0,1,2,3"})


def test_options_are_those_of_the_runner_and_of_their_types(tmp_path):
    def somewhere(job, *, hosts: int = 1, partition: str, spot: bool = False):
        return (hosts, partition, spot)

    table = {**RUNNERS, "somewhere": somewhere}
    job = Job(tmp_path, 1, print)
    assert bound(table, "somewhere", {"hosts": "3", "partition": "7", "spot": "True"})(job) == (3, "7", True)
    for options, message in (
        ({"host": "3"}, r"Unknown config key runner\.host\. Did you mean hosts\?"),
        ({"hosts": "many", "partition": "a"}, r"--runner\.hosts=many is not of type int"),
        ({"hosts": "True", "partition": "a"}, r"--runner\.hosts=True is not of type int"),
        ({}, r"The runner somewhere needs --runner\.partition=VALUE"),
    ):
        with pytest.raises(ValueError, match=message):
            bound(table, "somewhere", options)
    with pytest.raises(ValueError, match=r"runner\.name='lokal' is not one of local.*Did you mean local\?"):
        bound(table, "lokal", {})


def test_a_dry_run_says_what_would_be_started_and_touches_nothing(tmp_path):
    said = []
    job = Job(tmp_path / "s", 2, said.append, dry_run=True)
    core = present("cpu", {})[0]
    assert bound(RUNNERS, "local", {"platform": "cpu", "devices": f"{core};{core}"})(job) == 0
    assert said[1] == (
        f"on cores {core}, output to {tmp_path}/s/workers/{node()}-1.log:\n"
        f"  JAX_PLATFORMS=cpu {sys.executable} -m tuning work {tmp_path}/s --worker={node()}-1"
    )
    assert len(said) == 2 and not list(tmp_path.iterdir())


# A worker that notes for each run when it began and ended, on which cores; what a run does to it is in FILE.
PRETEND = """
import json, os, pathlib, signal, sys, time
from tuning.sweep import states
path, worker, deeds = pathlib.Path(sys.argv[1]), sys.argv[2].partition("=")[2], json.loads(sys.argv[3])
def note(what, name):
    with (path / "notes").open("a") as file:
        file.write(json.dumps([what, name, worker, time.monotonic(), sorted(os.sched_getaffinity(0))]) + "\\n")
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
while claim := states.take(path, json.loads((path / "sweep.json").read_text())["points"], worker):
    note("begins", claim.name)
    deed = deeds.get(claim.name, "")
    if deed == "dies" or deed == "dies once" and states.read(path, claim.name).deaths == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    until = time.monotonic() + (60 if deed == "is long" else 0.3)
    while time.monotonic() < until and not asked:
        time.sleep(0.01)
    if asked:
        claim.released()
        note("stops", claim.name)
        sys.exit(130)
    claim.failed("OSError", 0) if deed == "fails" else claim.done({"step": 6, "eval/loss": 0.5})
    claim.close()
    note("ends", claim.name)
"""


@pytest.fixture
def pretend(home, tmp_path, monkeypatch):
    """Runs four seeds with workers that pretend; (exit status, what was said, what the workers noted)."""
    plan = sweep.plan(Sweep(runs.config(home), seeds(4)))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    monkeypatch.setattr(local, "POLL", 0.02)

    def run(workers=2, **deeds):
        deeds = {f"seed={key[1:]}": deed for key, deed in deeds.items()}
        command = lambda self, *flags: [sys.executable, "-c", PRETEND, str(self.directory), *flags, json.dumps(deeds)]  # noqa: E731
        monkeypatch.setattr(Job, "command", command)
        said, core = [], present("cpu", {})[0]
        status = local.local(Job(tmp_path, workers, said.append), devices=";".join([core] * workers))
        notes = [json.loads(line) for line in (tmp_path / "notes").open()]
        assert all(cores == [int(core)] for *_, cores in notes)
        return status, said, notes

    return run


def test_two_run_at_a_time_and_each_run_once(pretend):
    status, said, notes = pretend()
    assert status == 0 and sorted(name for what, name, *_ in notes if what == "ends") == [f"seed={i}" for i in range(4)]
    on = most = 0
    for what, *_ in sorted(notes, key=lambda note: note[3]):
        on += 1 if what == "begins" else -1
        most = max(most, on)
    assert most == 2 and {worker for _, _, worker, *_ in notes} == {f"{node()}-0", f"{node()}-1"}
    assert said[-1].startswith("done") and "(4 done)" in said[-1] and "eval/loss 0.5000" in said[-1]


def test_no_more_workers_are_started_than_runs_wait(pretend, tmp_path):
    (tmp_path / "states").mkdir()
    for i in range(3):
        (tmp_path / "states" / f"seed={i}.json").write_text('{"state": "done"}')
    status, _, notes = pretend()
    assert status == 0 and [note[:2] for note in notes] == [["begins", "seed=3"], ["ends", "seed=3"]]
    assert len(list((tmp_path / "workers").iterdir())) == 1


def test_a_worker_that_died_is_started_again_and_its_run_is_taken_up(pretend, tmp_path):
    status, said, notes = pretend(_1="dies once")
    assert status == 0 and [states.read(tmp_path, f"seed={i}").state for i in range(4)] == ["done"] * 4
    assert [name for what, name, *_ in notes if what == "begins"].count("seed=1") == 2
    assert any("ended with signal 9; its output is in" in line for line in said)


def test_a_run_that_kills_every_worker_fails_and_the_others_are_made(pretend, tmp_path):
    status, said, _ = pretend(workers=1, _0="dies", _2="fails")
    assert status == 1 and said[-1] == f"2 of 4 runs failed; {tmp_path}/states says why, and --retry_failed tries them again."
    assert [states.read(tmp_path, f"seed={i}").state for i in range(4)] == ["failed", "done", "failed", "done"]


def test_workers_that_cannot_even_start_are_given_up(home, tmp_path, monkeypatch):
    plan = sweep.plan(Sweep(runs.config(home), seeds(2)))
    sweep.write(tmp_path, plan, sweep.resolve(plan))
    monkeypatch.setattr(local, "POLL", 0.02)
    monkeypatch.setattr(Job, "command", lambda self, *flags: [sys.executable, "-c", "print('no'); raise SystemExit(3)"])
    said = []
    assert local.local(Job(tmp_path, 1, said.append)) == 1
    assert said == [f"Worker {node()}-0 ended with exit status 3; its output is in {tmp_path}/workers/{node()}-0.log."] * local.LIVES
    assert (tmp_path / "workers" / f"{node()}-0.log").read_text() == "no\n" * local.LIVES


def test_ctrl_c_reaches_every_worker_once_and_leaves_their_runs_waiting(pretend, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        while [states.read(tmp_path, f"seed={i}").state for i in range(2)] != ["running"] * 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, said, notes = pretend(_0="is long", _1="is long")
    thread.join()
    assert status == 130 and [states.read(tmp_path, f"seed={i}").state for i in range(4)] == ["waiting"] * 4
    assert sorted(note[:2] for note in notes if note[0] != "begins") == [["stops", "seed=0"], ["stops", "seed=1"]]
    assert said[-1] == "Stopped. 4 of 4 runs wait; the same command goes on with them."
    assert signal.getsignal(signal.SIGINT) is before
    assert pretend()[0] == 0 and [states.read(tmp_path, f"seed={i}").state for i in range(4)] == ["done"] * 4


def test_a_terminal_shows_what_runs_and_what_ended_last(home, tmp_path):
    made = {f"seed={i}": State("done", ended=float(i), final={"eval/loss": i / 4, "train/nll": 9.0}) for i in range(30)}
    made["bad"] = State("failed", ended=99.0, error="OSError: gone")
    made |= {"on": State("running", worker="1"), "new": State("running", worker="0"), "later": State()}
    run = tmp_path / "runs" / "on"
    run.mkdir(parents=True)
    workdir.write_json(run / "config.json", {"train": {"steps": 60}})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "x": "y" * 5000}) + "\n" + '{"step": 14}\n')
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(Board(tmp_path, print)._table(made))
    lines = console.export_text().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert lines[0].strip() == "1 waiting, 2 running, 30 done, 1 failed"
    assert len(rows) == 20 and rows[0] == ["seed=13", "done", "", "", "eval/loss 3.2500"]
    assert rows[-3:] == [["bad", "failed", "", "", "OSError: gone"], ["on", "running", "1", "14/60", ""], ["new", "running", "0", "0", ""]]


def test_a_sweep_that_was_killed_and_interrupted_is_the_same_runs(home, tmp_path):
    """With a real worker: it is killed, the next one is interrupted with the sweep, and the same command goes on."""
    values = runs.config(home, mesh__fsdp=1, train__steps=60, train__log_every=2, checkpoint__every=5)
    config = runs.write_config(tmp_path / "config.py", values)
    path = tmp_path / "s"
    command = ("sweep", f"--config={config}", "--seeds=2", f"--dir={path}", f"--runner.devices={present('cpu', {})[0]}")
    settings = {
        "count": 1, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    metrics = path / "runs" / "seed=0" / "metrics.jsonl"

    def wait_for(step):
        while first.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            time.sleep(0.005)

    first = runs.start(*command, **settings)
    wait_for(14)
    os.kill(json.loads((path / "claims" / "seed=0.1").read_text())["process"], signal.SIGKILL)
    while not (path / "claims" / "seed=0.2").exists() and first.poll() is None:
        time.sleep(0.005)
    wait_for(20)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=240)
    assert first.returncode == 130, out
    assert "-0 ended with signal 9" in out and "the same command goes on with them" in out
    before = states.survey(path, ["seed=0", "seed=1"])
    assert before["seed=0"].state in ("waiting", "done") and before["seed=1"].state == "waiting"  # it may have been at its last step
    again = runs.start(*command, **settings)
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and [states.read(path, f"seed={i}").state for i in range(2)] == ["done"] * 2, out
    plan = sweep.plan(Sweep(values, choice("seed", 1, 0)))  # undisturbed, in the other order
    sweep.write(tmp_path / "other", plan, sweep.resolve(plan))
    other = runs.start("work", str(tmp_path / "other"), **settings)
    out, _ = other.communicate(timeout=240)
    assert other.returncode == 0 and out.index("\nseed=1\n") < out.index("\nseed=0\n"), out
    for name in plan.points:
        one, two = (writer.comparable(where / "runs" / name / "metrics.jsonl") for where in (path, tmp_path / "other"))
        assert one == two and one[-1]["step"] == 60
