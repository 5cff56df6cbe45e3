"""Runners on clusters: what they write and execute, against commands that note it and do it here; two processes stand for a pod."""

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests import devices, runs
from tests.sweep import schemas
from tuning.sweep import states, sweep
from tuning.sweep.runners import RUNNERS, launch
from tuning.sweep.runners.runner import Job, bound
from tuning.sweep.space import grid
from tuning.training import writer

STUBS = Path(__file__).parent / "stubs"
OPTIONS = {
    "slurm": {"partition": "gpu", "time": "08:00:00", "gpus": "a100:8", "cpus": "32", "options": "--qos=high --mail-user='a b'"},
    "tpu_vm": {"type": "v5litepod-16", "zone": "us-west4-a", "project": "mine", "options": "--spot", "setup": "", "poll": "0"},
    "gke": {"image": "here/tuning:1", "claim": "filestore", "accelerator": "tpu-v5-lite-podslice", "topology": "4x4"},
    "skypilot": {"accelerators": "H100:8", "volume": "shared", "nodes": "2", "setup": "true", "options": "--infra=gcp/us-central1"},
}
BUCKET = {"volume": "", "bucket": "gs://b/c", "nodes": "1"}  # in the place of a volume


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder in which the commands of a cluster, all of them on the PATH, note what they were asked for."""
    here = tmp_path / "cluster"
    (here / "bin").mkdir(parents=True)
    for stub in STUBS.iterdir():
        (here / "bin" / stub.name).symlink_to(stub)
    for name in ("scontrol", "kubectl", "sky", "rsync"):
        (here / "bin" / name).symlink_to(STUBS / "noted")
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    for name, value in {"STUBS": here, "STUB_JOB": 100, "STUB_STATES": "WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "WORKER": 0}.items():
        monkeypatch.setenv(name, str(value))
    return here


def start(runner, folder, workers=1, dry_run=False, /, **options):
    """(exit status, lines said) of a runner; the worker is the stub, unless another Python is named."""
    said = []
    if not dry_run:
        folder.mkdir(exist_ok=True)
    settings = {**OPTIONS[runner], "python": str(STUBS / "worker"), **options}
    return bound(RUNNERS, runner, settings)(Job(folder, workers, said.append, dry_run)), said


def executed(cluster):
    file = cluster / "executed"
    return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


def arguments(cluster):
    """Of all workers that were started, in order."""
    every = (cluster / "workers").read_bytes().decode().split("\0")
    text = "\n".join(every)
    return [part.strip("\n").split("\n") for part in text.split("-m\ntuning\n")[1:]]


# A sweep trains.


def free_port():
    """One of those from which jax takes the first process's under Slurm: 61440 + job % 4096."""
    for port in random.sample(range(61440, 65536), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise AssertionError("no free port")


@pytest.mark.parametrize("runner, options", [("slurm", {"nodes": "2"}), ("tpu_vm", {"repository": str(runs.ROOT)})])
def test_two_processes_as_a_pod_train_a_sweep(home, tmp_path, cluster, monkeypatch, runner, options):
    port = free_port()
    settings = {**devices.environment(1), "PYTHONPATH": runs.ROOT, "STUB_JOB": port - 61440, "STUB_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    # The mesh has two devices, of which each process has one.
    config = runs.config(home, train__steps=1, optimizer={"name": "sgd", "learning_rate": 0.1}, mesh={"data": 1, "fsdp": 2})
    del config["data"]["eval"]
    plan = sweep.plan(sweep.Sweep(config, grid({"seed": (0, 1)})))
    folder = tmp_path / "a sweep"
    sweep.write(folder, plan, sweep.resolve(plan))
    status, _ = start(runner, folder, python=sys.executable, **options)
    logs = "\n".join(path.read_text() for path in (folder / "workers").iterdir())
    assert status == 0, logs
    assert [states.read(folder, name).state for name in plan.points] == [states.DONE] * 2, logs
    losses = {writer.read(folder / "runs" / name / "metrics.jsonl")[0]["train/loss"] for name in plan.points}
    assert len(losses) == 2


# What is executed.


@pytest.mark.parametrize("runner", OPTIONS)
def test_a_dry_run_says_what_would_be_executed_and_touches_nothing(tmp_path, cluster, runner):
    before = sorted(tmp_path.rglob("*"))
    status, said = start(runner, tmp_path / "sweep", 2, True)
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    start(runner, tmp_path / "sweep", 2)
    files = sorted((tmp_path / "sweep" / "launch").iterdir())
    assert said[: len(files)] == [f"# {file}\n{file.read_text()}" for file in files]
    commands = [shlex.split(line.removeprefix("$ ")) for line in said[len(files) :]]
    if runner == "tpu_vm":
        assert commands == [["bash", str(file)] for file in files]
    else:
        assert commands == executed(cluster)


@pytest.mark.parametrize("runner", OPTIONS)
def test_names_with_blanks_and_shell_characters_arrive_as_they_are(tmp_path, cluster, monkeypatch, runner):
    directory = tmp_path / 'it\'s $(touch hacked) "a" sweep; #1%'
    monkeypatch.chdir(tmp_path)
    start(runner, directory, **({"mount": str(tmp_path)} if runner in ("gke", "skypilot") else {}))
    if runner in ("gke", "skypilot"):
        (file,) = (directory / "launch").iterdir()
        asked = yaml.safe_load(file.read_text())
        if runner == "gke":
            pod = asked["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            command = pod["containers"][0]["command"]
            assert [word.replace("$$(", "$(") for word in command[:5]] == [str(STUBS / "worker"), "-m", "tuning", "work", str(directory)]
            return
        subprocess.run(["bash", "-c", asked["run"]], check=True)
    started = [words[:2] for words in arguments(cluster)]
    assert started and started == [["work", str(directory)]] * len(started)
    assert not list(tmp_path.rglob("hacked"))


def test_slurm_is_asked_for_an_array_of_workers(tmp_path, cluster):
    start("slurm", tmp_path / "sweep", 3, nodes="2")
    flags = ["--partition=gpu", "--time=08:00:00", "--gpus-per-node=a100:8", "--cpus-per-task=32", "--qos=high", "--mail-user=a b"]
    assert executed(cluster) == [["sbatch", *flags, str(tmp_path / "sweep" / "launch" / "slurm.sh")]]
    # Both nodes of a task are one worker.
    workers = [f"--worker=slurm-100-{task}" for task in (0, 0, 1, 1, 2, 2)]
    assert arguments(cluster) == [["work", str(tmp_path / "sweep"), "--distributed", worker] for worker in workers]


@pytest.mark.parametrize(
    "ends, restarts, again",
    [("0", 0, False), ("143", 0, True), ("1", 0, True), ("143", 50, False), ("cancelled", 0, False)],
    ids=["done", "preempted", "died", "too_often", "cancelled"],
)
def test_slurm_queues_a_task_again_unless_it_is_done_or_cancelled(tmp_path, cluster, monkeypatch, ends, restarts, again):
    monkeypatch.setenv("WORKER", ends)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    start("slurm", tmp_path / "sweep")
    assert executed(cluster)[1:] == [["scontrol", "requeue", "100"]] * again


def verbs(cluster):
    return [(words[4], words[5]) for words in executed(cluster)]


def test_each_slice_is_asked_for_waited_for_and_given_back(tmp_path, cluster):
    status, _ = start("tpu_vm", tmp_path / "sweep", 2)
    assert status == 0
    create = next(words for words in executed(cluster) if words[4:6] == ["create", "tuning-sweep-0"])
    assert set(create[6:]) == {
        "--project=mine", "--zone=us-west4-a", "--node-id=tuning-sweep-0", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    }  # fmt: skip
    assert sorted(verbs(cluster)) == [(verb, f"tuning-sweep-{i}") for verb in ("create", "delete") for i in (0, 1)]
    started = [["work", str(tmp_path / "sweep"), f"--worker=tuning-sweep-{i}", "--distributed"] for i in (0, 0, 1, 1)]
    assert sorted(arguments(cluster)) == started


def test_a_slice_that_was_taken_away_is_asked_for_again(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("WORKER", "taken_away")
    status, _ = start("tpu_vm", tmp_path / "sweep")
    assert status == 0 and [verb for verb, _ in verbs(cluster)] == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize("queue, ends, status", [("FAILED", "0", 1), ("ACTIVE", "3", 3)])
def test_a_slice_is_given_back_after_a_failure_too(tmp_path, cluster, monkeypatch, queue, ends, status):
    monkeypatch.setenv("STUB_STATES", queue)
    monkeypatch.setenv("WORKER", ends)
    assert start("tpu_vm", tmp_path / "sweep", restarts="1")[0] == status
    assert [verb for verb, _ in verbs(cluster)] == ["create", "delete"]


def test_ctrl_c_saves_the_run_and_gives_the_slice_back(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("WORKER", "until_told")

    def interrupt():
        while not (cluster / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, _ = start("tpu_vm", tmp_path / "sweep")
    thread.join()
    assert status == 130
    assert (cluster / "saved").read_text() and [verb for verb, _ in verbs(cluster)] == ["create", "delete"]


# What the files are.


def rendered(runner, directory, workers=1, **options):
    start(runner, directory, workers, **options)
    return [yaml.safe_load(file.read_text()) for file in sorted((directory / "launch").iterdir())]


@pytest.mark.parametrize(
    "topology, chips, hosts, domain", [("4x4", 4, 4, "gke-nodepool"), ("2x2x4", 4, 4, "gke-nodepool"), ("2x4", 8, 1, "hostname")]
)
def test_a_worker_on_gke_is_a_jobset_of_one_slice(tmp_path, cluster, topology, chips, hosts, domain):
    first, second = rendered("gke", tmp_path / "sweep", 2, topology=topology, chips=str(chips), name="mine")
    jsonschema.validate(first, schemas.JOBSET)
    assert (first["metadata"]["name"], second["metadata"]["name"]) == ("mine-0", "mine-1")
    assert first["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"].endswith(domain)
    job = first["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", hosts, hosts)
    pod = job["template"]["spec"]
    labels = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": topology}
    assert pod["nodeSelector"] == labels and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    distributed = ["--distributed"] if hosts > 1 else []
    assert container["command"][2:] == ["tuning", "work", "/sweeps/sweep", "--worker=mine-0", *distributed]


@pytest.mark.parametrize(
    "options, storage, distributed",
    [
        ({}, {"volumes": {"/sweeps": "shared"}}, True),
        ({"accelerators": "tpu-v5litepod-16", "nodes": "1", "spot": "True"}, {"volumes": {"/sweeps": "shared"}}, True),
        (BUCKET, {"/sweeps": {"source": "gs://b/c", "mode": "MOUNT_CACHED"}}, False),
    ],
    ids=["nodes", "slice", "bucket"],
)
def test_a_worker_on_skypilot_is_a_managed_job(tmp_path, cluster, options, storage, distributed):
    (task,) = rendered("skypilot", tmp_path / "sweep", **options)
    jsonschema.validate(task, schemas.TASK)
    mounts = task["file_mounts"]
    assert storage.items() <= {**task, **mounts}.items() and {"~/sweep/sweep.json", "~/sweep/configs"} <= mounts.keys()
    assert task["resources"]["use_spot"] == ("spot" in options) and ("--distributed" in task["run"]) == distributed
    (command,) = executed(cluster)
    assert command == [
        "sky",
        "jobs",
        "launch",
        "--yes",
        "--detach-run",
        "--infra=gcp/us-central1",
        str(tmp_path / "sweep" / "launch" / "tuning-sweep-0.yaml"),
    ]


def fields(value):
    """(mapping, key) of all fields of a file; keys with a slash are labels and paths, which no schema knows."""
    if isinstance(value, dict):
        yield from ((value, key) for key in value if "/" not in key)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from fields(part)


@pytest.mark.parametrize(
    "schema, runner, options",
    [(schemas.JOBSET, "gke", {}), (schemas.TASK, "skypilot", {}), (schemas.TASK, "skypilot", BUCKET)],
    ids=["gke", "volume", "bucket"],
)
def test_the_schemas_refuse_a_misspelt_field_and_a_wrong_type_anywhere(tmp_path, cluster, schema, runner, options):
    (file,) = rendered(runner, tmp_path / "sweep", **options)
    jsonschema.validate(file, schema)
    fits, found = jsonschema.Draft202012Validator(schema).is_valid, list(fields(file))
    assert len(found) >= 11
    for within, key in found:
        right = within.pop(key)
        for wrong in ({key[:-1]: right}, {key: None}):
            within.update(wrong)
            assert not fits(file), wrong
            within.pop(*wrong)
        within[key] = right
    assert fits(file)  # as it was


# Mistakes.


@pytest.mark.parametrize(
    "runner, workers, options, message",
    [
        ("slurm", 1, {"options": "--qos high"}, "'high' is no option of sbatch"),
        ("slurm", 0, {}, "0 workers of 1 nodes"),
        ("slurm", 1, {"template": "nowhere.sh"}, "There is no template nowhere.sh"),
        ("tpu_vm", 1, {"type": "v9-8"}, r"--runner.version=IMAGE"),
        ("tpu_vm", 1, {"name": "Mine!"}, "small letters"),
        ("tpu_vm", 1, {"directory": "sweeps/a"}, "must be the whole path"),
        ("gke", 1, {"topology": "16"}, "chips by chips"),
        ("gke", 1, {"topology": "2x3"}, "a whole number of hosts"),
        ("gke", 1, {"directory": "/elsewhere/a"}, "must lie in --runner.mount=/sweeps"),
        ("skypilot", 1, {"volume": ""}, "needs --runner.volume"),
        ("skypilot", 2, {"volume": "", "bucket": "gs://a", "nodes": "1"}, "serves one worker of one node"),
        ("skypilot", 1, {"accelerators": "tpu-v4-16"}, "a worker is one slice"),
    ],
)
def test_a_mistake_is_said_before_anything_is_started(tmp_path, cluster, runner, workers, options, message):
    with pytest.raises(ValueError, match=message):
        start(runner, tmp_path / "sweep", workers, **options)
    assert not executed(cluster) and not list((tmp_path / "sweep").iterdir())


@pytest.mark.parametrize("runner, missing", [("tpu_vm", "type"), ("tpu_vm", "zone"), ("gke", "claim"), ("skypilot", "accelerators")])
def test_an_option_that_is_needed_is_named(runner, missing):
    with pytest.raises(ValueError, match=rf"needs --runner\.{missing}"):
        bound(RUNNERS, runner, {key: value for key, value in OPTIONS[runner].items() if key != missing})


def test_a_machine_without_the_program_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not on this machine's PATH"):
        start("slurm", tmp_path / "sweep")


def test_a_template_of_ones_own_is_filled_in_and_leaves_the_shell_its_own(tmp_path, cluster):
    own = tmp_path / "own.sh"
    own.write_text("#SBATCH --array=0-${last}\n#SBATCH --nodes=${nodes}\necho ${HOME} $nodes $(date) ${x:-1} ${nodes}\n")
    start("slurm", tmp_path / "sweep", nodes="3", template=str(own))
    assert (tmp_path / "sweep" / "launch" / "slurm.sh").read_text().splitlines()[-1] == "echo ${HOME} $nodes $(date) ${x:-1} 3"
    own.write_text("${node}")
    with pytest.raises(ValueError, match=r"nothing is known to fill in for \$\{node\}\. Did you mean nodes\?"):
        start("slurm", tmp_path / "sweep", template=str(own))


def test_a_name_is_made_of_the_directory_s(tmp_path):
    job = Job(tmp_path / "Learning_rates, 3 (b)", 1, print)
    assert launch.name(job, "") == "tuning-learning-rates-3-b"
    assert len(launch.name(Job(tmp_path / ("x" * 90), 1, print), "")) == 40
