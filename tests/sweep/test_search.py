"""Searches: what is suggested, what is pruned, and that trials are runs of a sweep like any other. Objectives are formulas here."""

import json
import math
import random as randoms
import shlex
import statistics

import optuna
import pytest
from optuna.trial import TrialState

from tests import runs
from tuning import build
from tuning.cli import flags
from tuning.core import config as configs
from tuning.sweep import picks, search, states, sweep, trials
from tuning.sweep.search import Search
from tuning.sweep.space import chain, choice, grid, integers, log_uniform, product, random, seeds, uniform, when, zipped
from tuning.sweep.trials import suggested

RATE, DROPOUT = "optimizer.learning_rate", "method.dropout"
PLANE = product(log_uniform(RATE, 1e-5, 1e-1), uniform(DROPOUT, 0.0, 0.5))


def settings(space, count, sampler="random", pruner="none", *, steps=27, every=1, goal="min", storage="", objectives=None, **options):
    rest, each = picks.unseeded(space)
    options = {key: str(value) for key, value in options.items()}
    made = Search(
        rest, each, count, search.part(search.SAMPLERS, sampler, options, "search"), search.part(search.PRUNERS, pruner, {}, "pruner"),
        objectives or {"eval/loss": goal}, every, steps, storage, "study",
    )  # fmt: skip
    search.check(made)
    return made


@pytest.fixture
def make(home, tmp_path):
    """A sweep's directory with a search."""

    def make(space, count, sampler="random", pruner="none", *, name="sweep", steps=27, every=9, **more):
        at, made = tmp_path / name, settings(space, count, sampler, pruner, steps=steps, every=every, **more)
        config = runs.config(home, train__steps=steps, eval__every=every)
        (measure, goal), *_ = made.objectives.items()
        sweep.write(at, sweep.Plan({}, configs.plain(config), measure, goal, 1), {})
        search.write(at, made)
        return at

    return make


def bowl(point, step=27):
    """Lowest, at 0, for a rate of 1e-3 and a dropout of 0.2; it comes down to that while it trains."""
    return (math.log10(point[RATE]) + 3) ** 2 + 25 * (point[DROPOUT] - 0.2) ** 2 + 2 / step


def simulate(made, objective=bowl, kept=None, limit=10**9):
    """Goes through a search without a directory; the study, and how many steps were made."""
    kept = kept or optuna.storages.InMemoryStorage()
    search.begun(made, kept)
    study, spent = search.study(made, kept), 0
    while len(trials := study.trials) - sum(trial.state.name == "WAITING" for trial in trials) < made.trials and limit:
        trial, limit = study.ask(), limit - 1
        point = made.parameters.draw(lambda name, domain, trial=trial: suggested(trial, name, domain))
        trial.set_user_attr("point", point)
        for step in range(made.every, made.steps + 1, made.every):
            spent += made.every
            value = objective(point, step)
            trial.report(value, step)
            if pruned := step < made.steps and trial.should_prune():
                break
        study.tell(trial, None if pruned else value, TrialState.PRUNED if pruned else None)
    return study, spent


def drive(directory, objective=bowl, limit=10**9):
    """Works as a worker does, with a formula for training. [(run, steps made)]"""
    found, made = trials.load(directory), []
    while len(made) < limit and (claim := found.take("w")):
        config = json.loads((directory / "configs" / f"{claim.name}.json").read_text())
        point = configs.flat(config)
        for step in range(config["eval"]["every"], config["train"]["steps"] + 1, config["eval"]["every"]):
            measures = {"eval/loss": objective(point, step), "train/loss": 2.0}
            if pruned := found.heard(claim.name, step, measures):
                break
        claim.pruned(measures) if pruned else claim.done(measures)
        claim.close()
        made.append((claim.name, step))
    return made


def points(study):
    return [trial.user_attrs["point"] for trial in study.trials]


def told(study):
    return [(trial.state.name, trial.values) for trial in study.trials]


BRANCHES = product(
    chain(
        product(choice("method.name", "lora"), choice("method.rank", 2, 4, 8), choice("method.targets", ("all",), ("attn/q", "attn/v"))),
        product(choice("method.name", "loha"), choice("method.rank", 2, 3)),
        choice("method.name", "ia3"),
    ),
    log_uniform(RATE, 1e-4, 1e-2), zipped({"train.steps": [27, 54], "eval.every": [1, 2]}), integers("data.train.length", 30, 32),
    when("method.name", "lora", uniform(DROPOUT, 0.0, 0.5)), seeds(2),
)  # fmt: skip


def test_a_space_comes_back_as_it_was_written_and_its_seeds_apart():
    rest, found = picks.unseeded(BRANCHES)
    assert found == (0, 1) and picks.unseeded(product(PLANE, integers("seed", 3, 5)))[1] == (3, 4, 5)
    assert picks.unseeded(PLANE) == (PLANE, ())
    assert picks.unpacked(json.loads(json.dumps(picks.packed(rest)))) == rest


def test_a_branch_and_its_keys_are_parameters_of_their_own():
    asked = {}

    def suggest(name, domain):
        asked[name] = domain
        return domain.values[-2] if isinstance(domain, picks.Choice) else domain.high

    found = picks.Parameters(picks.unseeded(BRANCHES)[0]).draw(suggest)
    assert found == {"method.name": "loha", "method.rank": 2, RATE: 1e-2, "train.steps": 27, "eval.every": 1, "data.train.length": 32}
    assert list(asked) == ["branch.0", "method.rank#2", RATE, "train.steps,eval.every", "data.train.length"]
    assert asked["method.rank#2"].values == (2, 3)


def test_the_corners_of_a_space_have_every_value_and_both_ends():
    corners = picks.Parameters(picks.unseeded(BRANCHES)[0]).corners()
    seen = {(point["method.name"], key, val) for point, _ in corners for key, val in point.items()}
    assert {val for name, key, val in seen if (name, key) == ("lora", "method.rank")} == {2, 4, 8}
    assert {val for name, key, val in seen if (name, key) == ("loha", "method.rank")} == {2, 3}
    assert {val for _, key, val in seen if key == "method.targets"} == {("all",), ("attn/q", "attn/v")}
    assert {val for _, key, val in seen if key == DROPOUT} == {0.0, 0.5} and {val for _, key, val in seen if key == RATE} == {1e-4, 1e-2}
    assert {val for _, key, val in seen if key == "train.steps"} == {27, 54} and len(corners) == 11


def test_a_grid_is_gone_through_in_its_order_once(make):
    space = product(
        chain(grid({"method.name": ["lora"], "method.rank": [2, 4]}), grid({"method.name": ["ia3"]})), grid({RATE: [1e-3, 1e-2]})
    )
    at = make(space, 6, "grid")
    assert [trial[0] for trial in drive(at, lambda config, step: 1 / step)] == [
        "0,lora,rank=2,learning_rate=1e-3", "1,lora,rank=2,learning_rate=0.01", "2,lora,rank=4,learning_rate=1e-3",
        "3,lora,rank=4,learning_rate=0.01", "4,ia3,learning_rate=1e-3", "5,ia3,learning_rate=0.01",
    ]  # fmt: skip
    assert [trial.point for trial in trials.load(at).all().values()] == sweep.points(space)


STARTUP = {"tpe": {"startup": 4}, "gp": {"startup": 4}, "nsga": {"population": 4}}


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_the_same_seed_suggests_the_same_and_so_does_a_search_that_was_stopped(sampler):
    space = product(PLANE, choice("method.rank", 2, 4)) if sampler != "grid" else grid({RATE: [1e-4, 1e-3], DROPOUT: [0.1, 0.2, 0.3, 0.4]})
    made = settings(space, 8, sampler, steps=2, **STARTUP.get(sampler, {}))
    whole, _ = simulate(made)
    kept = optuna.storages.InMemoryStorage()
    for limit in (2, 4, 10):
        parts, _ = simulate(made, kept=kept, limit=limit)
    assert points(parts) == points(whole) and told(parts) == told(whole)
    assert len({json.dumps(point) for point in points(whole)}) == 8
    if sampler != "grid":
        other, _ = simulate(settings(space, 8, sampler, steps=2, seed=1, **STARTUP.get(sampler, {})))
        assert points(other)[0] != points(whole)[0]


@pytest.mark.parametrize("sampler,count", [("tpe", 60), ("gp", 16), ("cmaes", 60), ("nsga", 80)])
def test_a_sampler_learns_from_its_trials(sampler, count):
    """The last ones lie nearer to the optimum than as many random points."""
    late = {}
    for name in (sampler, "random"):
        study, _ = simulate(settings(PLANE, count, name, steps=1, **STARTUP.get(name, {})))
        late[name] = statistics.median(values[0] for _, values in told(study)[-count // 3 :])
    assert late[sampler] - 2 < 0.5 * (late["random"] - 2)


def noisy(seed):
    """The bowl with noise that is large at first; a run's noise is its own."""

    def objective(point, step):
        rng = randoms.Random(f"{seed} {point[RATE]} {point[DROPOUT]} {step}")
        return bowl(point, step) + rng.gauss(0, 0.5 / math.sqrt(step))

    return objective


LINES = {RATE: [10 ** (-5 + i / 2) for i in range(9)], DROPOUT: [i / 16 for i in range(9)]}


def test_hyperband_finds_the_neighbourhood_of_the_optimum_with_a_third_of_the_steps_of_the_grid():
    """Half a decade of rates and a sixteenth of dropout: 1/32 of the plane; and closer than whole runs of as many steps come."""
    _, whole = simulate(settings(grid(LINES), 81, "grid"), noisy(0))
    near, regrets = 0, {"hyperband": [], "none": []}
    for seed in range(12):
        for pruner, sampler, count in (("hyperband", "tpe", 64), ("none", "random", whole // 3 // 27)):
            study, spent = simulate(settings(PLANE, count, sampler, pruner, seed=seed), noisy(seed))
            found = study.best_trial.user_attrs["point"]
            regrets[pruner].append(bowl(found) - 2 / 27)
            assert spent <= whole / 3
            near += pruner == "hyperband" and abs(math.log10(found[RATE]) + 3) < 0.5 and abs(found[DROPOUT] - 0.2) < 1 / 16
    assert near >= 11
    assert statistics.mean(regrets["hyperband"]) < 0.7 * statistics.mean(regrets["none"])


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_pruner_saves_steps_and_keeps_the_best(pruner):
    whole, _ = simulate(settings(PLANE, 40, "random"))
    study, spent = simulate(settings(PLANE, 40, "random", pruner))
    assert spent < 0.7 * 40 * 27 and study.best_value == pytest.approx(whole.best_value, abs=0.2)


def test_the_value_of_a_trial_is_the_mean_over_its_seeds(make):
    at = make(product(PLANE, seeds(3)), 2)
    made = drive(at, lambda point, step: bowl(point) + point["seed"])
    assert [name.partition(",")[0] for name, _ in made] == ["0"] * 3 + ["1"] * 3
    assert [name.rpartition(",")[2] for name, _ in made] == ["seed=0", "seed=1", "seed=2"] * 2
    found = trials.load(at)
    assert [trial.values for trial in found.study.trials] == [[pytest.approx(bowl(trial.point) + 1)] for trial in found.all().values()]
    assert found.study.trials[0].intermediate_values == {step: pytest.approx(bowl(found.all()[0].point)) for step in (9, 18, 27)}
    plan = sweep.load(at)
    assert list(plan.points) == [name for name, _ in made] and plan.more == 0
    assert {state.state for state in states.survey(at, plan.points).values()} == {"done"}


def test_a_trial_goes_on_where_its_worker_died_and_is_told_once_its_runs_have_ended(make):
    at = make(product(PLANE, seeds(2)), 1)
    claim = trials.load(at).take("dying")
    assert sweep.load(at).more == 0
    claim.close()  # its file says that it runs, and nobody holds it
    assert told(trials.load(at).study) == [("RUNNING", None)]
    assert drive(at, limit=1)[0][0] == claim.name and states.read(at, claim.name).deaths == 1
    found = trials.load(at)
    found.settle()
    assert told(found.study) == [("RUNNING", None)]
    assert len(drive(at)) == 1 and told(trials.load(at).study)[0][0] == "COMPLETE" and drive(at) == []


def worst_last(point, step):
    """The third of its trials is the worst, whatever its point."""
    return point["data.train.length"] / 30 + 1 / step


LENGTHS = product(grid({"data.train.length": [30, 31, 32, 33, 34, 60]}), seeds(2))


def test_where_the_first_run_of_a_trial_is_pruned_so_are_the_others(make):
    at = make(LENGTHS, 6, "grid", "median")
    made = drive(at, worst_last)
    standing = {name: state.state for name, state in states.survey(at, sweep.load(at).points).items()}
    assert made[-1] == ("5,length=60,seed=0", 9) and standing["5,length=60,seed=0"] == standing["5,length=60,seed=1"] == "pruned"
    assert [state for name, state in standing.items() if "60" not in name] == ["done"] * 10
    assert told(trials.load(at).study)[-1][0] == "PRUNED" and states.read(at, "5,length=60,seed=0").final["eval/loss"] > 2


def test_a_run_that_is_on_ends_where_the_first_of_its_trial_was_pruned(make):
    at = make(LENGTHS, 6, "grid", "median")
    drive(at, worst_last, limit=10)
    one, other = trials.load(at), trials.load(at)
    first, second = one.take("a"), other.take("b")
    assert (first.name, second.name) == ("5,length=60,seed=0", "5,length=60,seed=1")
    assert not other.heard(second.name, 9, {"eval/loss": 0.1})  # its own losses do not matter
    assert one.heard(first.name, 9, {"eval/loss": 3.0})
    first.pruned({})
    assert other.heard(second.name, 18, {"eval/loss": 0.1})
    for claim in (first, second):
        claim.close()


def test_a_worker_begins_another_trial_before_seeds_of_one_that_may_be_pruned(make):
    for pruner, second in (("median", "1,length=31,seed=0"), ("none", "0,length=30,seed=1")):
        at = make(LENGTHS, 6, "grid", pruner, name=pruner)
        claims = [trials.load(at).take(worker) for worker in "ab"]
        assert [claim.name for claim in claims] == ["0,length=30,seed=0", second]
        for claim in claims:
            claim.close()


def test_a_loss_that_is_not_finite_is_bad_and_another_error_says_nothing(make):
    at = make(grid({"method.rank": [2, 4, 8]}), 3, "grid")
    found = trials.load(at)
    for error in ("FloatingPointError: the loss is not finite", "OSError: gone"):
        with_run = found.take("w")
        with_run.failed(error, 0)
        with_run.close()
    with_run = found.take("w")
    with_run.done({"eval/loss": math.nan})
    with_run.close()
    assert found.take("w") is None
    assert told(found.study) == [("PRUNED", None), ("FAIL", None), ("PRUNED", None)]


def test_a_measure_that_no_run_has_is_an_error(make):
    at = make(grid({"method.rank": [2, 4, 8]}), 3, "grid", objectives={"eval/f1": "max"})
    with pytest.raises(ValueError, match=r"0,rank=2 has no eval/f1: it has eval/loss, train/loss"):
        drive(at)


def test_a_point_is_trained_once(make):
    at = make(product(choice("method.rank", 2, 4), choice("data.train.length", 30, 32)), 12, "random")
    made = drive(at, worst_last)
    found = trials.load(at)
    assert len(made) == len({json.dumps(trial.point) for trial in found.all().values()}) == 3 and len(found.study.trials) == 12
    assert {trial.state.name for trial in found.study.trials} == {"COMPLETE"} and "9 had the point of an earlier one" in found.report()
    assert all(found.study.trials[number].params == found.study.trials[trial.same].params
               for number, trial in found.all().items() if trial.same is not None)  # fmt: skip


def test_a_trial_that_was_lost_while_it_was_asked_for_is_made_up_for(make, monkeypatch):
    at = make(PLANE, 3)
    found = trials.load(at)
    found.study.ask()  # and its worker dies
    assert len(drive(at)) == 2
    monkeypatch.setattr(trials, "STALE", -1.0)
    assert len(drive(at)) == 1
    assert [state for state, _ in told(trials.load(at).study)] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_the_last_trial_is_begun_once_where_two_ask_for_it(make, monkeypatch):
    at = make(PLANE, 2)
    drive(at, limit=1)
    found = trials.load(at)
    ask = found.study.ask

    def late():
        assert len(drive(at)) == 1  # another worker was faster
        return ask()

    monkeypatch.setattr(found.study, "ask", late)
    assert found.take("w") is None
    assert [state for state, _ in told(found.study)] == ["COMPLETE", "COMPLETE", "FAIL"] and len(sweep.load(at).points) == 2


def test_a_point_that_no_run_can_have_is_a_failed_trial_without_runs(make):
    at = make(grid({"method.rank": [2, 2.5, 4]}), 3, "grid")
    assert [name for name, _ in drive(at, lambda point, step: 1 / point["method.rank"])] == ["0,rank=2", "2,rank=4"]
    found = trials.load(at)
    assert [state for state, _ in told(found.study)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "method.rank=2.5 is not of type int" in found.all()[1].error


def test_two_objectives_have_a_front(make):
    at = make(grid({"method.rank": [1, 2, 4, 8]}), 4, "grid", objectives={"eval/loss": "min", "params": "min"})
    drive(at, lambda point, step: {1: 4.0, 2: 2.0, 4: 3.0, 8: 1.0}[point["method.rank"]])
    found = trials.load(at)
    assert [trial.values for trial in found.best()] == [[4.0, 928.0], [2.0, 1856.0], [1.0, 7424.0]]
    assert "trial 0, eval/loss 4, params 928" in found.report()


def test_the_best_point_is_said_in_flags_that_a_run_accepts(make, home):
    at = make(picks.unseeded(BRANCHES)[0], 14, "tpe", startup=5)
    drive(at, lambda point, step: abs(math.log10(point[RATE]) + 3) + 1 / step)
    found = trials.load(at)
    (best,) = found.best()
    name, *others = found.all()[best.number].points
    _, overrides, rest = flags.split(shlex.split(trials.flags(found.all()[best.number].point)))
    assert not others and not rest
    merged = build.resolve(flags.merge(sweep.load(at).config, overrides))
    assert configs.plain(merged) == configs.plain(sweep.run_config(at, name))
    report = found.report()
    assert trials.flags(found.all()[best.number].point) in report and "14 trials: 14 complete" in report, report


def test_a_search_may_go_on_to_more_trials_and_to_nothing_else(make):
    at = make(PLANE, 2)
    drive(at)
    search.write(at, settings(PLANE, 4, every=9))
    assert sweep.load(at).more == 2 and len(drive(at)) == 2
    with pytest.raises(ValueError, match=r"another search: sampler: {'name': 'tpe'.* here, {'name': 'random', 'seed': 0} there"):
        search.write(at, settings(PLANE, 4, "tpe", every=9))
    with pytest.raises(ValueError, match="another search: trials: 3 here, 4 there"):
        search.write(at, settings(PLANE, 3, every=9))
    with pytest.raises(ValueError, match="another search: space"):
        search.write(at, settings(product(PLANE, choice("method.rank", 2, 4)), 4, every=9))


REFUSED = {
    "no such sampler": (lambda: settings(PLANE, 4, "bayes"), r"--search=bayes is not one of tpe, gp, cmaes"),
    "no such pruner": (lambda: settings(PLANE, 4, "tpe", "hyperbnad"), r"--pruner=hyperbnad .* Did you mean hyperband\?"),
    "no such option": (lambda: settings(PLANE, 4, "tpe", population=3), r"--search.population: tpe takes seed, startup"),
    "an option that is no number": (lambda: settings(PLANE, 4, "tpe", startup="many"), r"--search.startup=many is no whole number"),
    "no trials": (lambda: settings(PLANE, 0), r"--trials=0"),
    "a measure that is none": (lambda: settings(PLANE, 4, objectives={"evl/loss": "min"}), r"--measure=evl/loss is neither params, bytes"),
    "pruning by two": (lambda: settings(PLANE, 4, "nsga", "median", objectives={"eval/loss": "min", "params": "min"}), "there are 2"),
    "pruning by what is known at the end": (lambda: settings(PLANE, 4, "tpe", "median", objectives={"best/eval/loss": "min"}), "during"),
    "pruning without evaluations": (lambda: settings(PLANE, 4, "tpe", "median", every=0), r"set --config.eval.every"),
    "pruning at the end": (lambda: settings(PLANE, 4, "tpe", "median", every=27), r"set --config.eval.every"),
    "cmaes by two": (lambda: settings(PLANE, 4, "cmaes", objectives={"eval/loss": "min", "params": "min"}), "cmaes has one objective"),
    "cmaes of one number": (lambda: settings(log_uniform(RATE, 1e-4, 1e-2), 4, "cmaes"), r"two ranges .* has optimizer.learning_rate"),
    "cmaes of a branch": (lambda: settings(chain(PLANE, grid({"a": [1, 2]})), 4, "cmaes"), r"the space has none"),
    "a grid of ranges": (lambda: settings(PLANE, 4, "grid"), r"learning_rate takes any number from 1e-05 to 0.1"),
    "more than the grid": (lambda: settings(grid({"a": [1, 2]}), 4, "grid"), r"--trials=4, and the grid has 2 points"),
    "points drawn before": (lambda: settings(random(PLANE, 5), 4), r"random\(count=5\) draws its points before"),
    "nothing to search": (lambda: settings(product(choice("a", 1), seeds(3)), 4), "nothing to search"),
    "seeds of a branch": (lambda: settings(chain(seeds(3), choice("a", 1, 2)), 4), r"write seeds\(n\) in the product"),
    "a database that is none": (lambda: settings(PLANE, 4, storage="postgres"), r"--storage: .*postgresql\+psycopg"),
    "a password": (lambda: settings(PLANE, 4, storage="postgresql+psycopg://a:secret@b/c"), "PGPASSWORD"),
    "a database without a driver": (lambda: settings(PLANE, 4, storage="oracle+cx_oracle://a@b/c"), "driver"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_searched_is_refused_at_the_start(what):
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        make()


def test_gp_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch"):
        settings(PLANE, 4, "gp")
