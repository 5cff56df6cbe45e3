"""Searches in processes: workers that share a study, in a journal file or in PostgreSQL, and `tuning sweep --search` with real runs."""

import collections
import contextlib
import glob
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile

import pytest

from tests import runs
from tuning.__main__ import main
from tuning.core import config as configs
from tuning.sweep import picks, search, space, states, sweep, trials
from tuning.sweep.space import log_uniform, product, seeds, uniform

RATE, DROPOUT = "optimizer.learning_rate", "method.dropout"

WORK = """
import json, pathlib, sys, time
from tuning.sweep import trials
at, worker = pathlib.Path(sys.argv[1]), sys.argv[2]
found = trials.load(at)
print("ready", flush=True)
sys.stdin.read()
while claim := found.take(worker):
    rate = json.loads((at / "configs" / f"{claim.name}.json").read_text())["optimizer"]["learning_rate"]
    for step in (9, 18, 27):
        time.sleep(0.02)
        if pruned := found.heard(claim.name, step, {"eval/loss": rate + 1 / step}):
            break
    claim.pruned({}) if pruned else claim.done({"eval/loss": rate})
    claim.close()
"""


@pytest.fixture(scope="module")
def postgres():
    """The URL of a PostgreSQL server that lives as long as these tests."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not programs and not shutil.which("initdb"):
        pytest.skip("no PostgreSQL server is installed (apt-get install postgresql)")
    user: dict = {}
    if os.geteuid() == 0:  # whom the server does not run for
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, socket.socket() as free:
        if user:
            os.chown(home, user["user"], user["group"])
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def call(program, *args):
            path = f"{programs[-1]}/{program}" if programs else program
            done = subprocess.run([path, "-D", f"{home}/data", *args], cwd=home, env={"PATH": os.environ["PATH"]}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **user)  # fmt: skip
            assert done.returncode == 0, done.stdout

        call("initdb", "-U", "tuning", "-A", "trust", "-E", "UTF8", "--no-sync")
        call("pg_ctl", "start", "-w", "-l", f"{home}/log", "-o", f"-F -p {port} -k {home} -h 127.0.0.1")
        try:
            yield f"postgresql+psycopg://tuning@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")


PLANE = product(log_uniform(RATE, 1e-4, 1e-2), uniform(DROPOUT, 0.0, 0.5), seeds(2))


def written(at, home, within, count, sampler, *, startup, every, storage=""):
    """A search with a median pruner that waits for `startup` trials, in a sweep's directory."""
    rest, each = picks.unseeded(within)
    pruner = search.part(search.PRUNERS, "median", {"startup": str(startup)}, "pruner")
    sampled = search.part(search.SAMPLERS, sampler, {}, "search")
    made = search.Search(rest, each, count, sampled, pruner, {"eval/loss": "min"}, every, 3 * every, storage, "study")
    search.check(made)
    config = configs.plain(runs.config(home, train__steps=3 * every, eval__every=every))
    search.write(at, made)
    sweep.write(at, sweep.Plan({}, config, "eval/loss", "min", 1), {})
    return made


@pytest.mark.parametrize("where", ["journal", "postgres"])
def test_two_processes_share_a_study(where, home, tmp_path, request):
    storage = request.getfixturevalue("postgres") if where == "postgres" else ""
    made = written(tmp_path, home, PLANE, 12, "tpe", startup=2, every=9, storage=storage)
    with contextlib.ExitStack() as stack:
        started = []
        for name in "ab":
            command = [sys.executable, "-c", WORK, str(tmp_path), name]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            started.append(stack.enter_context(subprocess.Popen(command, env=runs.environment(), cwd=runs.ROOT, **pipes)))
            stack.callback(started[-1].kill)  # where the test fails, nobody waits for a process that will not end
        assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
        for process in started:
            process.stdin.close()
        assert [process.wait(300) for process in started] == [0, 0]
    found = trials.load(tmp_path)
    assert (tmp_path / "study.journal").exists() == (where == "journal")
    told = found.study.get_trials()
    begun = [trial for trial in told if trials.LOST not in trial.user_attrs]
    assert len(begun) == 12 and set(found.all()) == {trial.number for trial in begun}
    assert len({json.dumps(trial.params) for trial in begun}) == 12
    plan = sweep.load(tmp_path)
    standing = states.survey(tmp_path, plan.points)
    assert len(standing) == 24 and {state.state for state in standing.values()} <= {"done", "pruned"} and plan.more == 0
    assert set(collections.Counter(state.worker for state in standing.values())) >= {"a", "b"}
    assert all(states._latest(tmp_path)[name] == 1 for name in plan.points)  # nobody took what another had
    for trial in begun:
        ended = {standing[name].state for name in found.all()[trial.number].points}
        rate = found.all()[trial.number].point[RATE]
        assert trial.state.name == ("PRUNED" if "pruned" in ended else "COMPLETE")
        assert trial.value == pytest.approx(rate if trial.state.name == "COMPLETE" else rate + 1 / trial.last_step)
    assert {"PRUNED", "COMPLETE"} == {trial.state.name for trial in begun}
    if where == "postgres":
        with pytest.raises(ValueError, match="The storage has a study study already, of another sweep"):
            (tmp_path / "other").mkdir()
            search.write(tmp_path / "other", made)


def test_a_database_that_does_not_answer_is_refused(tmp_path, home):
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match=r"--storage: .*postgresql\+psycopg://USER@HOST/DATABASE"):
        written(tmp_path, home, PLANE, 3, "tpe", startup=2, every=9, storage="postgresql+psycopg://tuning@127.0.0.1:1/postgres")


@pytest.fixture
def config(home, tmp_path):
    return f"--config={runs.write_config(tmp_path / 'config.py', runs.config(home))}"


def test_a_real_search_prunes_the_run_that_does_not_learn_and_says_which_is_best(config, tmp_path, capsys):
    at = tmp_path / "sweep"
    command = ["sweep", config, f"--sweep.{RATE}=3e-2,1e-9", "--search=grid", "--pruner=median", "--pruner.startup=1", f"--dir={at}"]
    assert main(command) == 0
    assert {name: state.state for name, state in states.survey(at, sweep.load(at).points).items()} == {
        "0,learning_rate=0.03": "done", "1,learning_rate=1e-9": "pruned",
    }  # fmt: skip
    for name, last in (("0,learning_rate=0.03", 6), ("1,learning_rate=1e-9", 3)):
        lines = [json.loads(line) for line in (at / "runs" / name / "metrics.jsonl").open()]
        assert lines[-1]["step"] == last and (at / "runs" / name / "checkpoints" / str(last)).is_dir()
    found = trials.load(at).study.trials
    evals = [
        line["eval/loss"]
        for line in map(json.loads, (at / "runs" / "0,learning_rate=0.03" / "metrics.jsonl").open())
        if "eval/loss" in line
    ]
    assert list(found[0].intermediate_values.values()) == evals[1:] and found[0].value == evals[-1] < evals[0]
    said = capsys.readouterr().out
    assert "2 trials: 1 complete, 1 pruned" in said and f"--config.{RATE}=0.03" in said
    assert main(command) == 0
    assert trials.load(at).study.trials == found and len(list((at / "claims").iterdir())) == 2  # nothing is left to go on with


def test_two_processes_that_are_one_worker_end_a_run_together(home, tmp_path):
    written(tmp_path, home, space.grid({RATE: [3e-2, 1e-9]}), 2, "grid", startup=1, every=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("work", str(tmp_path), "--worker=pod", f"--coordinator=127.0.0.1:{port}", "--processes=2")
    processes = [runs.start(*command, f"--process={i}", count=4) for i in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    assert [state.state for state in states.survey(tmp_path, sweep.load(tmp_path).points).values()] == ["done", "pruned"]
    assert [trial.state.name for trial in trials.load(tmp_path).study.trials] == ["COMPLETE", "PRUNED"]


def test_a_dry_run_checks_the_ends_of_the_space_and_says_what_the_search_is(config, tmp_path, capsys):
    flags = [f"--sweep.{RATE}=log_uniform(1e-4, 1e-2)", "--sweep.method.rank=2,4", "--seeds=2"]
    assert main(["sweep", config, *flags, "--search=nsga", "--trials=9", "--measure=eval/loss,params", "--dry_run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "These 3 points at the ends of the space were checked" in said
    assert "9 trials of 2 runs (seeds 0, 1) by eval/loss (min), params (min); sampler nsga seed=0 population=20; pruner none" in said
    assert not list(tmp_path.glob("DIR*")) and "Dry run" in said


REFUSED = {
    "an end that no run can have": ([f"--sweep.{RATE}=uniform(-1.0,1.0)", "--search=tpe", "--trials=3"], r"learning_rate=-1: .*negative"),
    "a range upside down": ([f"--sweep.{RATE}=uniform(1,0)", "--search=tpe", "--trials=3"], "must be less than"),
    "a range of no search": ([f"--sweep.{RATE}=uniform(0,1)"], "takes any number"),
    "no trials": ([f"--sweep.{RATE}=uniform(0,1)", "--search=tpe"], "needs --trials=N"),
    "trials of no search": (["--sweep.method.rank=2,4", "--trials=3"], "--trials belongs to a search"),
    "options of no search": (["--sweep.method.rank=2,4", "--pruner.factor=3"], r"--pruner\.factor belongs to a search"),
    "measures of no search": (["--sweep.method.rank=2,4", "--measure=eval/loss,params"], "compared by one measure"),
    "a goal too many": (["--sweep.method.rank=2,4", "--search=grid", "--goal=min,min"], "Give a goal for each measure"),
    "a cost that is raised": (["--sweep.method.rank=2,4", "--search=grid", "--measure=eval/loss,flops", "--goal=min,max"], "be lowered"),
    "failed ones again": (["--sweep.method.rank=2,4", "--search=grid", "--retry_failed"], "Raise --trials"),
    "one point": (["--search=tpe", "--trials=3"], "nothing to search"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_search_that_makes_no_sense_is_refused_and_nothing_is_written(what, config, tmp_path, capsys):
    flags, message = REFUSED[what]
    at = tmp_path / "sweep"
    with pytest.raises((ValueError, SystemExit), match=message):
        from tuning.cli import sweep as cli

        cli.main([config, *flags, f"--dir={at}"])
    assert not at.exists()


def test_a_listed_sweep_is_not_gone_on_with_as_a_search(config, tmp_path, monkeypatch):
    from tuning.cli import sweep as cli

    monkeypatch.setattr("tuning.sweep.runners.RUNNERS", {"local": lambda job: 0})
    monkeypatch.setattr(cli, "pretend", lambda *_: None)
    one, other = f"--dir={tmp_path / 'listed'}", f"--dir={tmp_path / 'searched'}"
    assert cli.main([config, "--sweep.method.rank=2,4", one]) == 0
    with pytest.raises(ValueError, match="points are listed: leave out --search"):
        cli.main([config, "--sweep.method.rank=2,4", "--search=grid", one])
    with pytest.raises(ValueError, match=r"--storage: .*unable to open database file"):
        cli.main([config, "--sweep.method.rank=2,4", "--search=grid", other, "--storage=sqlite:////nowhere/x.db"])
    assert cli.main([config, "--sweep.method.rank=2,4", "--search=grid", other]) == 0
    with pytest.raises(ValueError, match="points are searched: give --search"):
        cli.main([config, "--sweep.method.rank=2,4", other])
    with pytest.raises(ValueError, match=r"another sweep: train\.steps: 7 here, 6 there"):
        cli.main([config, "--config.train.steps=7", "--sweep.method.rank=2,4", "--search=grid", other])
