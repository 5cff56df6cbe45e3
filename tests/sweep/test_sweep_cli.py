"""tuning sweep: what the flags say, the dry run, and that nonsense is refused before anything is written."""

import json

import pytest

from tests import runs
from tuning.__main__ import main
from tuning.cli import sweep as cli
from tuning.sweep import states, sweep
from tuning.sweep.runners.local import present
from tuning.training import workdir


@pytest.fixture
def config(home, tmp_path):
    return f"--config={runs.write_config(tmp_path / 'config.py', runs.config(home))}"


@pytest.fixture
def alone(monkeypatch):
    """What `tuning sweep` would start, instead of starting it."""
    asked = []
    monkeypatch.setattr("tuning.sweep.runners.RUNNERS", {"local": lambda job, *, devices="": asked.append(job) or 0})
    return asked


@pytest.mark.parametrize(
    "text, words",
    [
        ("1e-5,3e-5", ["1e-5", "3e-5"]),
        ("('q','v'),('all',)", ["('q','v')", "('all',)"]),
        ("'a,b', \"c,(\" ,d", ["'a,b'", '"c,("', "d"]),
        ("[1,[2,3]],{4,5}", ["[1,[2,3]]", "{4,5}"]),
        ("one", ["one"]),
    ],
)
def test_commas_inside_of_brackets_and_quotes_belong_to_a_value(text, words):
    assert cli.apart(text) == words


def test_values_are_of_their_key_s_type_and_keys_of_their_part(home):
    found = cli.values(
        runs.config(home),
        {
            "optimizer.learning_rate": "1,3e-5", "method.targets": "('attn/q','attn/v'),('all',)", "train.steps": "5",
            "method.rank": "4,8", "method.name": "ia3,lora", "data.train.pack": "True,False", "model.adapter": "a,b", "seed": "3",
        },
    )  # fmt: skip
    assert found == {
        "optimizer.learning_rate": [1.0, 3e-5], "method.targets": [("attn/q", "attn/v"), ("all",)], "train.steps": [5],
        "method.rank": [4, 8], "method.name": ["ia3", "lora"], "data.train.pack": [True, False], "model.adapter": ["a", "b"], "seed": [3],
    }  # fmt: skip
    assert [type(value) for value in found["optimizer.learning_rate"]] == [float, float]


def test_the_flags_make_the_runs_and_a_runner_gets_them(config, tmp_path, alone):
    flags = ["--config.train.steps=3", "--sweep.optimizer.learning_rate=1e-3,1e-2", "--seeds=2", "--retries=2", "--goal", "max"]
    command = ["sweep", config, *flags, "--measure=eval/accuracy", f"--dir={tmp_path / 's'}", "--workers=2"]
    command.append("--runner.devices={0};{0}".format(present("cpu", {})[0]))
    assert main(command) == 0
    names = [f"learning_rate={rate},seed={seed}" for rate in ("1e-3", "0.01") for seed in range(2)]
    plan = sweep.load(tmp_path / "s")
    assert list(plan.points) == names and (plan.measure, plan.goal, plan.retries) == ("eval/accuracy", "max", 2)
    assert plan.points[names[1]] == {"optimizer.learning_rate": 1e-3, "seed": 1}
    made = sweep.run_config(tmp_path / "s", names[1])
    assert (made["optimizer"]["learning_rate"], made["seed"], made["train"]["steps"]) == (1e-3, 1, 3)
    dry, job = alone
    assert dry.dry_run and not job.dry_run and (job.directory, job.workers) == (tmp_path / "s", 2)


def test_a_sweep_file_has_what_the_flags_cannot_say_and_takes_more_of_them(config, home, tmp_path, alone):
    (tmp_path / "sweep.py").write_text(
        "from tuning.sweep.space import chain, grid, log_uniform, product, random\n"
        "from tuning.sweep.sweep import Sweep\n\n\n"
        "def get_sweep():\n"
        "    methods = chain(grid({'method.name': ['lora'], 'method.rank': [4]}), grid({'method.name': ['ia3']}))\n"
        f"    rates = random(log_uniform('optimizer.learning_rate', 1e-4, 1e-2), 2)\n"
        f"    return Sweep({str(tmp_path / 'config.py')!r}, product(methods, rates), goal='min', retries=0)\n"
    )
    assert main(["sweep", f"--sweep={tmp_path / 'sweep.py'}", "--config.train.steps=3", "--seeds=2", f"--dir={tmp_path / 's'}"]) == 0
    plan = sweep.load(tmp_path / "s")
    assert len(plan.points) == 8 and plan.retries == 0 and plan.config["train"]["steps"] == 3
    assert [name.split(",")[0] for name in plan.points] == ["lora"] * 4 + ["ia3"] * 4
    assert len({point["optimizer.learning_rate"] for point in plan.points.values()}) == 2


def test_a_dry_run_lists_every_run_with_its_cost_and_writes_nothing(config, tmp_path, capsys):
    flags = ["--sweep.method.rank=2,4", "--seeds=2", f"--dir={tmp_path / 's'}", f"--runner.devices={present('cpu', {})[0]}"]
    assert main(["sweep", config, *flags, "--dry_run"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[:5] for row in rows] == [
        [f"rank={r},seed={s}", f"method.rank={r} seed={s}", "waiting", f"{928 * r:,}", f"{928 * r * 4:,}"] for r in (2, 4) for s in (0, 1)
    ]
    assert float(rows[0][5]) < float(rows[2][5])
    assert "4 runs, 4 of them to be made" in out and f"tuning work {tmp_path / 's'} --worker=" in out
    assert "nothing was compiled, loaded, written or started" in out and not (tmp_path / "s").exists()


MISTAKES = {
    "unknown key": (["--sweep.method.rnak=4,8"], "Unknown config key method.rnak. Did you mean rank?"),
    "unknown part": (["--sweep.method.name=lora,lorra"], "method.name='lorra' is not one of"),
    "wrong type": (["--sweep.train.steps=many"], "steps"),
    "a key of one part only": (["--sweep.method.name=lora,ia3", "--sweep.method.rank=4"], "Run ia3: Unknown config key method.rank"),
    "a value twice": (["--sweep.train.steps=5,5"], "train.steps has the value 5 twice"),
    "a point twice": (["--sweep.seed=0,1", "--seeds=2"], "seed is set twice in one point"),
    "a mistake in one run": (["--sweep.method.targets=('all',),('qq',)"], "Run targets=qq: "),
    "a mistake in the common config": (["--config.method.rnak=4"], "Unknown config key method.rnak"),
    "no seeds": (["--seeds=0"], "seeds(0): give at least 1"),
    "no workers": (["--workers=0"], "--workers=0: give at least 1"),
    "too many workers": (["--workers=4096"], "--workers=4096, and there are"),
    "an option that the runner does not have": (["--runner.device=0"], "Did you mean devices?"),
    "a measure that is never taken": (["--measure=kept/loss"], "data.kept has no path"),
    "two configs": (["--sweep=x.py"], "--sweep=x.py has a config of its own"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_writes_nothing(mistake, config, tmp_path, capsys):
    flags, message = MISTAKES[mistake]
    assert main(["sweep", config, f"--dir={tmp_path / 's'}", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") <= 2 and not (tmp_path / "s").exists()


def test_a_sweep_needs_its_flags_and_files(config, tmp_path, capsys):
    (tmp_path / "other.py").write_text("def get_sweep():\n    return {}\n")
    for flags, message in (
        ([config], "needs --dir=DIR"),
        (["--dry_run"], "needs --config=FILE.py or --sweep=FILE.py"),
        (["--sweep=nowhere.py", "--dry_run"], "--sweep=nowhere.py: no such file"),
        ([f"--sweep={tmp_path / 'config.py'}", "--dry_run"], "has no function get_sweep()"),
        ([f"--sweep={tmp_path / 'other.py'}", "--dry_run"], "returned a dict, not a Sweep"),
    ):
        assert main(["sweep", *flags]) == 2 and message in capsys.readouterr().err
    assert main(["work", str(tmp_path / "nowhere")]) == 2 and "has no sweep.json" in capsys.readouterr().err


def test_the_same_command_goes_on_and_may_add_points_and_try_failed_ones_again(config, tmp_path, alone, capsys):
    command = ["sweep", config, f"--dir={tmp_path / 's'}"]
    assert main([*command, "--seeds=2"]) == 0
    (tmp_path / "s" / "states").mkdir()
    workdir.write_json(tmp_path / "s" / "states" / "seed=0.json", {"state": "done"})
    workdir.write_json(tmp_path / "s" / "states" / "seed=1.json", {"state": "failed", "attempts": 2})
    assert main([*command, "--seeds=3"]) == 0 and len(alone) == 4
    standing = lambda: [states.read(tmp_path / "s", f"seed={i}").state for i in range(3)]  # noqa: E731
    assert standing() == ["done", "failed", "waiting"]
    assert main([*command, "--seeds=3", "--retry_failed"]) == 0 and standing() == ["done", "waiting", "waiting"]
    assert main([*command, "--seeds=2"]) == 2 and "it has the run seed=2, which is no point of this one" in capsys.readouterr().err
    assert main([*command, "--seeds=3", "--config.train.steps=4"]) == 2 and "train.steps: 4 here, 6 there" in capsys.readouterr().err
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["points"]["seed=2"] == {"seed": 2}


def test_a_dry_run_says_which_runs_are_one_program_and_why_others_are_not(config, tmp_path, alone, capsys):
    command = ["sweep", config, "--sweep.method.dora=True,False", "--seeds=2", "--dry_run", "--sweep.optimizer.learning_rate=1e-3,1e-2"]
    assert main([*command, "--vectorize=3"]) == 0
    said = capsys.readouterr().out
    assert said.count("2 in one program: ") == 4
    assert main([*command[:3], "--dry_run", "--vectorize=auto"]) == 0
    assert "alone, since no other run has its method.dora=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--vectorize=all"], "neither off, auto nor"), (["--vectorize=4", "--search=grid"], "set --vectorize=off")],
)
def test_programs_of_a_wrong_size_are_refused(flags, said, config, capsys):
    assert main(["sweep", config, "--sweep.method.rank=2,4", "--dry_run", *flags]) == 2
    assert said in capsys.readouterr().err
