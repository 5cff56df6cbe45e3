"""A search: what a sweep tries next by what came of the rest, and which runs are not worth going on with. Optuna decides both.

DIR/search.json    the search: its space, sampler, pruner, how many trials
DIR/study.journal  Optuna's study, unless --storage names a database
DIR/trials/N.json  what trial N trains; see trials.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tuning.core import parts
from tuning.core.parts import Part
from tuning.sweep import picks
from tuning.sweep.picks import Parameters
from tuning.sweep.space import Choice, Space
from tuning.training import workdir

try:
    import optuna
except ImportError:
    raise ImportError("A search needs Optuna, which comes with an extra: pip install 'tuning[search]'.") from None
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

COSTS = {"params": "trainable", "bytes": "nbytes", "flops": "flops"}  # objectives that are known before a run: {name: field of sweep.Cost}
TAKEN = ("eval/", "kept/", "train/", "best/", "before/", "time/", "memory/")  # where a run's own measures are
HEARD = ("eval/", "kept/", "train/")  # those that are there while it runs


@dataclasses.dataclass(frozen=True)
class Search:
    """What search.json holds.

    space       of the points, without seeds
    seeds       each point is trained with all of these, and its value is the mean over them; () for the config's own seed
    trials      points in all
    sampler     {"name": key of SAMPLERS, and its options}; pruner likewise of PRUNERS
    objectives  {measure: "min" or "max"}; the first one is what a pruner looks at
    every, steps  of a run: steps between evaluations and in all, the fewest and the most where runs differ
    storage     an SQL URL, or "" for a journal in the sweep's directory
    study       its name there
    """

    space: Space
    seeds: tuple[int, ...]
    trials: int
    sampler: dict[str, Any]
    pruner: dict[str, Any]
    objectives: dict[str, str]
    every: int
    steps: int
    storage: str
    study: str

    @functools.cached_property
    def parameters(self) -> Parameters:
        return Parameters(self.space)

    @property
    def prunes(self) -> bool:
        return self.pruner["name"] != "none"


def tpe(*, seed: int = 0, startup: int = 10) -> BaseSampler:
    """Tree-structured Parzen estimators, of all parameters together (Bergstra et al. 2011; Watanabe 2023); `startup` trials are random."""
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def gp(*, seed: int = 0, startup: int = 10) -> BaseSampler:
    """A Gaussian process and its expected improvement in log space (Ament et al. 2023)."""
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)


def cmaes(*, seed: int = 0, population: int = 0) -> BaseSampler:
    """CMA-ES (Hansen 2016), of numbers; `population` points per generation, 0 for what their count asks for."""
    return optuna.samplers.CmaEsSampler(seed=seed, popsize=population or None, warn_independent_sampling=False)


def nsga(*, seed: int = 0, population: int = 20) -> BaseSampler:
    """NSGA-II (Deb et al. 2002): the front between several objectives; the first generation is random."""
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)


def random(*, seed: int = 0) -> BaseSampler:
    """Each point by itself."""
    return optuna.samplers.RandomSampler(seed=seed)


def grid(*, seed: int = 0) -> BaseSampler:
    """All points of the space, in its order: they wait in the study from the start."""
    return optuna.samplers.RandomSampler(seed=seed)


def none(search: Search) -> optuna.pruners.BasePruner:
    """Every run is trained to its end."""
    return optuna.pruners.NopPruner()


def median(search: Search, *, startup: int = 5, warmup: int = 0) -> optuna.pruners.BasePruner:
    """A run ends when its best evaluation is worse than the median of the others' at its step; not before `warmup` steps are made."""
    return optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)


def halving(search: Search, *, factor: int = 3, first: int = 0) -> optuna.pruners.BasePruner:
    """Successive halving (Li et al. 2020): one of `factor` goes on at `first` steps (0: the first evaluation), `factor` times that, ..."""
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=first or search.every, reduction_factor=factor)


def hyperband(search: Search, *, factor: int = 3, first: int = 0) -> optuna.pruners.BasePruner:
    """Hyperband (Li et al. 2018): halving in several brackets at once, which begin to prune at `first` steps, `factor` times that, ..."""
    return optuna.pruners.HyperbandPruner(min_resource=first or search.every, max_resource=search.steps, reduction_factor=factor)


SAMPLERS: dict[str, Part] = {"tpe": tpe, "gp": gp, "cmaes": cmaes, "nsga": nsga, "random": random, "grid": grid}
PRUNERS: dict[str, Part] = {"none": none, "median": median, "halving": halving, "hyperband": hyperband}


def part(table: Mapping[str, Part], name: str, options: Mapping[str, str], flag: str) -> dict[str, Any]:
    """A part's name and all its options, given as text. ValueError for one that it does not have, or that is no whole number."""
    if name not in table:
        raise ValueError(f"--{flag}={name} is not one of {', '.join(table)}.{parts.suggestion(name, table)}")
    known = parts.schema(table[name])
    if unknown := [key for key in options if key not in known]:
        raise ValueError(f"--{flag}.{unknown[0]}: {name} takes {', '.join(known) or 'no options'}.{parts.suggestion(unknown[0], known)}")
    if wrong := [key for key, text in options.items() if not text.isdecimal()]:
        raise ValueError(f"--{flag}.{wrong[0]}={options[wrong[0]]} is no whole number.")
    return {"name": name, **known, **{key: int(text) for key, text in options.items()}}


def check(search: Search) -> None:
    """ValueError for what could not be searched, or not in the way that was asked for."""
    sampler, several = search.sampler["name"], len(search.objectives) > 1
    if search.trials < 1:
        raise ValueError(f"--trials={search.trials}: give at least 1.")
    if unknown := [name for name in search.objectives if name not in COSTS and not name.startswith(TAKEN)]:
        raise ValueError(f"--measure={unknown[0]} is neither {', '.join(COSTS)} nor what a run takes: {', '.join(TAKEN)}...")
    if search.storage:
        with _database():
            engine = sqlalchemy.create_engine(search.storage)  # which looks at the URL and its driver, and goes nowhere yet
        if engine.url.password:
            raise ValueError("--storage has a password, which search.json would show. Leave it to PGPASSWORD or a file of the driver's.")
    if several and search.prunes:
        raise ValueError(f"--pruner={search.pruner['name']} compares runs by one measure, and there are {len(search.objectives)}. Drop it.")
    if search.prunes and not next(iter(search.objectives)).startswith(HEARD):
        raise ValueError(f"A pruner looks at evaluations during training: set --measure to one of {', '.join(HEARD)}..., or --pruner=none.")
    if search.prunes and not 0 < search.every < search.steps:
        raise ValueError(f"A pruner needs evaluations during training, before its {search.steps} steps are made: set --config.eval.every.")
    PRUNERS[search.pruner["name"]](search, **_options(search.pruner))
    if several and sampler == "cmaes":
        raise ValueError("cmaes has one objective. Take --search=nsga, tpe or gp for several.")
    if sampler == "gp" and importlib.util.find_spec("torch") is None:
        raise ValueError("--search=gp computes with torch, which is not installed: pip install torch, or take --search=tpe.")
    corners = search.parameters.corners()
    everywhere = {name: domain for name, domain in corners[0][1].items() if all(name in domains for _, domains in corners)}
    numbers = [name for name, domain in everywhere.items() if not isinstance(domain, Choice)]
    if sampler == "cmaes" and len(numbers) < 2:
        raise ValueError(
            f"cmaes searches two ranges of numbers or more that every point has; the space has {', '.join(numbers) or 'none'}. "
            "Take --search=tpe."
        )
    if sampler == "grid" and search.trials > (count := len(search.parameters.grid())):
        raise ValueError(f"--trials={search.trials}, and the grid has {count} points. Leave it out for all of them.")


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "name"}


def described(search: Search) -> str:
    """The search, for people."""
    said = lambda settings: " ".join([settings["name"], *(f"{key}={value}" for key, value in _options(settings).items())])  # noqa: E731
    runs = f" of {len(search.seeds)} runs (seeds {', '.join(map(str, search.seeds))})" if len(search.seeds) > 1 else ""
    where = (
        f"the study {search.study} in {sqlalchemy.make_url(search.storage)!r}" if search.storage else "a journal in the sweep's directory"
    )
    goals = ", ".join(f"{name} ({goal})" for name, goal in search.objectives.items())
    return f"{search.trials} trials{runs} by {goals}; sampler {said(search.sampler)}; pruner {said(search.pruner)}; kept in {where}."


class Reseeded(BaseSampler):
    """A sampler that begins anew with each trial, from the seed and the trial's number.

    So a trial does not depend on which process asks for it, nor on how often processes were started: with one worker the same seed gives
    the same points, and workers that ask at the same time get different ones.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._make, self._options = SAMPLERS[settings["name"]], _options(settings)
        self._inner = self._make(**self._options)

    def before_trial(self, study, trial):
        state = np.random.SeedSequence([self._options["seed"], trial.number]).generate_state(1)
        self._inner = self._make(**{**self._options, "seed": int(state[0] % 2**31)})
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study, trial):
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values):
        self._inner.after_trial(study, trial, state, values)


def storage(directory: Path, search: Search) -> BaseStorage:
    """Where the study is kept. ValueError for a database that cannot be had."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not search.storage:
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(str(directory / "study.journal")))
    with _database():
        return optuna.storages.RDBStorage(search.storage, engine_kwargs={"pool_pre_ping": True})  # runs outlast idle connections


@contextlib.contextmanager
def _database():
    """ValueErrors for what SQLAlchemy finds wrong with a URL, its driver or its server."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"--storage: {error}. Install the driver that the URL names: pip install 'tuning[postgres]' for one.") from None
    except (SQLAlchemyError, ValueError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--storage: {said}. It reads as postgresql+psycopg://USER@HOST/DATABASE.") from None


def begun(search: Search, kept: BaseStorage) -> optuna.Study:
    """Makes the search's study in a storage, if it is not there yet; the points of a grid wait in it."""
    way = optuna.study.StudyDirection
    directions = [way.MINIMIZE if goal == "min" else way.MAXIMIZE for goal in search.objectives.values()]
    made = optuna.create_study(study_name=search.study, storage=kept, directions=directions, load_if_exists=True)
    if search.sampler["name"] == "grid":
        for parameters in search.parameters.grid()[len(made.get_trials(deepcopy=False)) : search.trials]:
            made.enqueue_trial(parameters)
    return made


def study(search: Search, kept: BaseStorage) -> optuna.Study:
    """The study that is in a storage, with the search's sampler and pruner."""
    sampler, pruner = Reseeded(search.sampler), PRUNERS[search.pruner["name"]](search, **_options(search.pruner))
    made = optuna.load_study(study_name=search.study, storage=kept, sampler=sampler, pruner=pruner)
    pruner.prune(made, optuna.trial.create_trial(state=TrialState.RUNNING))  # Hyperband has its brackets from now on
    return made


def write(directory: Path, search: Search) -> None:
    """Makes the study and search.json, or lets a search that is there go on to more trials. ValueError if it is another one."""
    before = load(directory)
    if before is not None:
        _going_on(search, before)
    made = begun(search, storage(directory, search))
    if before is None and any(trial.state != TrialState.WAITING for trial in made.get_trials(deepcopy=False)):
        raise ValueError(
            f"The storage has a study {search.study} already, of another sweep. Name this one's with --study=NAME, or delete that one."
        )
    workdir.write_json(directory / "search.json", dataclasses.asdict(search) | {"space": picks.packed(search.space)})


def _going_on(new: Search, before: Search) -> None:
    remedy = "Choose another --dir, or go on as it was begun; --trials may grow, nothing else changes."
    for field in dataclasses.fields(Search):
        here, there = getattr(new, field.name), getattr(before, field.name)
        if field.name == "space":
            here, there = picks.packed(here), picks.packed(there)
        if (here < there) if field.name == "trials" else (here != there):
            raise ValueError(f"The directory holds another search: {field.name}: {here} here, {there} there. {remedy}")


def load(directory: Path) -> Search | None:
    """The search of a sweep's directory; None if its points were listed."""
    if not (directory / "search.json").is_file():
        return None
    found = json.loads((directory / "search.json").read_text())
    return Search(**found | {"space": picks.unpacked(found["space"]), "seeds": tuple(found["seeds"])})
