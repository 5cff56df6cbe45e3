"""The trials of a search, and the runs of a sweep that each of them is.

    DIR/trials/N.json  trial N: its point, the points of its runs by name (one for each seed), what else is known before they begin

Any worker asks for a trial when no run waits, and tells the study what came of it once all its runs have ended: states.py alone says
how they stand, so a run that was interrupted, or whose worker died, goes on as in any sweep, and its trial is running until then. All of
this may be done again after a crash at any place. With a pruner the first run of a trial stands for it: its evaluations are what is
compared, and where it is pruned, so are the others, begun or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuning import build
from tuning.core import config as configs
from tuning.sweep import names, search, states, sweep
from tuning.sweep.space import Choice, Domain, Integers, Point, Uniform
from tuning.sweep.states import Claim
from tuning.training import workdir

LOST = "lost"  # marks a trial in the study that never had runs: its worker died while it asked, or another was faster to the last one
STALE = 300.0  # seconds after which a trial without a file is lost


@dataclasses.dataclass(frozen=True)
class Trial:
    """What DIR/trials/N.json holds.

    point   what its runs change of the sweep's config, without the seed
    points  {run: its point}, of all seeds
    costs   the objectives that are known before any run
    same    the number of an earlier trial with the same point, whose values are its own too; it has no runs then
    error   why it has no runs: a mistake in the config that the point makes
    """

    point: Point
    points: dict[str, Point]
    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    same: int | None = None
    error: str = ""


class Trials:
    """The trials of the search in a sweep's directory."""

    def __init__(self, directory: Path, settings: search.Search):
        self.directory, self.search = directory, settings
        self._storage = search.storage(directory, settings)
        self.study = search.study(settings, self._storage)
        self._study_id = self._storage.get_study_id_from_name(settings.study)
        self._read: dict[int, Trial] = {}

    def all(self) -> dict[int, Trial]:
        """The trials that have been asked for, by number. Their files never change."""
        for path in (self.directory / "trials").glob("*.json"):
            if (number := int(path.stem)) not in self._read:
                self._read[number] = Trial(**json.loads(path.read_text()))
        return dict(sorted(self._read.items()))

    def take(self, worker: str) -> Claim | None:
        """The next run for a worker, out of a new trial where none waits; None if the search has all its trials."""
        while True:
            self.settle()
            every = self.all().values()
            if claim := states.take(self.directory, [name for trial in every for name in self._ready(trial)], worker):
                return claim
            if not self.ask():
                return states.take(self.directory, [name for trial in every for name in trial.points], worker)

    def _ready(self, trial: Trial) -> list[str]:
        """Runs that are sure to be wanted: with a pruner only the first one, until it has come through."""
        found = list(trial.points)
        if self.search.prunes and found and states.read(self.directory, found[0]).state not in (states.DONE, states.FAILED):
            return found[:1]
        return found

    def ask(self) -> bool:
        """Begins a trial, unless the search has all its trials."""
        if sum(LOST not in trial.user_attrs for trial in self._begun()) >= self.search.trials:
            return False
        asked = self.study.ask()
        before = [trial for trial in self._begun() if LOST not in trial.user_attrs and trial.number < asked.number]
        if len(before) >= self.search.trials:  # another worker has asked for the last one in the meantime
            self._lose(asked.number)
            return False
        point = self.search.parameters.draw(lambda name, domain: suggested(asked, name, domain))
        found = self.all()
        same = next((number for number, trial in found.items() if trial.point == configs.plain(point) and trial.same is None), None)
        trial = Trial(point, {}, same=same) if same is not None else self._planned(asked.number, point)
        (self.directory / "trials").mkdir(exist_ok=True)
        workdir.write_json(self.directory / "trials" / f"{asked.number}.json", configs.plain(dataclasses.asdict(trial)))
        return True

    def _planned(self, number: int, point: Point) -> Trial:
        """A trial with its runs, whose configs are there."""
        plan = sweep.load(self.directory)
        label = f"{number:0{len(str(self.search.trials - 1))}}"
        points = [{**point, "seed": seed} for seed in self.search.seeds] or [point]
        corners = [corner for corner, _ in self.search.parameters.corners()]
        named = {f"{label},{names.label(one, corners)}": one for one in points}
        try:
            runs = sweep.resolve(dataclasses.replace(plan, points=named))
            first = next(iter(runs))
            wanted = [name for name in self.search.objectives if name in search.COSTS]
            cost = sweep.costs({first: build.revived(configs.plain(runs[first]))}, plan.measure)[first] if wanted else None
        except ValueError as error:
            return Trial(point, {}, error=str(error))
        for name, config in runs.items():
            workdir.write_json(self.directory / "configs" / f"{name}.json", configs.plain(config))
        return Trial(point, named, {name: float(getattr(cost, search.COSTS[name])) for name in wanted})

    def heard(self, name: str, step: int, measures: Mapping[str, float]) -> bool:
        """Notes an evaluation of a run; whether the run should end."""
        number, trial = next((n, trial) for n, trial in self.all().items() if name in trial.points)
        first = next(iter(trial.points))
        if name != first:
            return self.search.prunes and states.read(self.directory, first).state == states.PRUNED
        if len(self.search.objectives) > 1 or not step:
            return False
        measure = next(iter(self.search.objectives))
        if measure not in measures:
            if self.search.prunes:
                raise ValueError(f"The pruner compares {measure}, and an evaluation has {', '.join(measures)}. Set --measure.")
            return False
        key = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        if step not in self._storage.get_trial(key).intermediate_values:
            self._storage.set_trial_intermediate_value(key, step, float(measures[measure]))
        ends = step >= json.loads((self.directory / "configs" / f"{name}.json").read_text())["train"]["steps"]
        return not ends and self.study.pruner.prune(self.study, self._storage.get_trial(key))

    def settle(self) -> None:
        """Tells the study what came of the trials whose runs have ended."""
        found = self.all()
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if (trial := found.get(frozen.number)) is None:
                began = frozen.datetime_start
                if began and (datetime.datetime.now() - began).total_seconds() > STALE:
                    self._lose(frozen.number)
            elif outcome := self._outcome(trial, frozen):
                self._tell(frozen.number, *outcome)

    def _outcome(self, trial: Trial, frozen: FrozenTrial) -> tuple[TrialState, list[float] | None] | None:
        """(state, values) of a trial; None while it goes on."""
        if trial.error:
            return TrialState.FAIL, None
        if trial.same is not None:
            return self._outcome_of(trial.same, frozen)
        standing = states.survey(self.directory, trial.points)
        ended = [state.state for state in standing.values()]
        if self.search.prunes and ended[0] == states.PRUNED:
            for name in (name for name, state in standing.items() if state.state == states.WAITING):
                if claim := states.take(self.directory, [name], ""):
                    claim.pruned({})
                    claim.close()
            return TrialState.PRUNED, None
        if not {*ended} <= {states.DONE, states.FAILED}:
            return None
        if failed := [state.error for state in standing.values() if state.state == states.FAILED]:
            # A loss that is not finite says something of the point: samplers take what is pruned for bad, and do not see what has failed.
            diverged = all(error.startswith(FloatingPointError.__name__) for error in failed)
            return (TrialState.PRUNED if diverged else TrialState.FAIL), None
        values = [self._mean(name, trial, standing) for name in self.search.objectives]
        return (TrialState.COMPLETE, values) if all(map(math.isfinite, values)) else (TrialState.PRUNED, None)

    def _outcome_of(self, number: int, frozen: FrozenTrial) -> tuple[TrialState, list[float] | None] | None:
        """What came of an earlier trial, for one with the same point."""
        other = self.study.get_trials(deepcopy=False)[number]
        if not other.state.is_finished():
            return None
        for step in set(other.intermediate_values) - set(frozen.intermediate_values):
            self._storage.set_trial_intermediate_value(frozen._trial_id, step, other.intermediate_values[step])
        return other.state, other.values if other.state == TrialState.COMPLETE else None

    def _mean(self, name: str, trial: Trial, standing: Mapping[str, states.State]) -> float:
        if name in trial.costs:
            return trial.costs[name]
        for run, state in standing.items():
            if name not in state.final:
                raise ValueError(f"{run} has no {name}: it has {', '.join(state.final)}. Begin again with --measure set to one of them.")
        found = [state.final[name] for state in standing.values()]
        return math.fsum(math.nan if value is None else value for value in found) / len(found)

    def _tell(self, number: int, state: TrialState, values: list[float] | None) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another worker has just told it the same
            self.study.tell(number, values, state, skip_if_finished=True)

    def _begun(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def _lose(self, number: int) -> None:
        key = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(key, LOST, True)
        self._tell(number, TrialState.FAIL, None)

    def best(self) -> list[FrozenTrial]:
        """The best trial, or those that no other beats in all objectives; none if none is complete."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return self.study.best_trials[: None if len(self.search.objectives) > 1 else 1] if complete else []

    def report(self) -> str:
        """The best trials as flags of `tuning train`, what each parameter was worth, and what came of the trials."""
        found = self.all()
        told = [trial for trial in self.study.get_trials(deepcopy=False) if trial.number in found]
        counts = {state.name.lower(): sum(trial.state == state for trial in told) for state in TrialState}
        again = sum(trial.same is not None for trial in found.values())
        lines = [f"{len(told)} trials: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}"]
        lines[0] += f"; {again} had the point of an earlier one" if again else ""
        for frozen in sorted(self.best(), key=lambda trial: trial.values):
            values = ", ".join(f"{name} {value:.6g}" for name, value in zip(self.search.objectives, frozen.values, strict=True))
            trial = found[frozen.number]
            owner = trial if trial.same is None else found[trial.same]
            lines += [f"Best: trial {frozen.number}, {values} ({', '.join(owner.points)})", f"  {flags(trial.point)}"]
        lines += [f"Trial {number} has no runs: {trial.error}" for number, trial in found.items() if trial.error]
        if len(self.search.objectives) == 1 and counts["complete"] >= 20:
            shares = optuna.importance.get_param_importances(self.study)
            lines.append("What mattered for the best tenth: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        return "\n".join(lines)


def load(directory: Path) -> Trials | None:
    """The trials of a sweep's directory; None if its points were listed and not searched."""
    settings = search.load(directory)
    return settings and Trials(directory, settings)


def flags(point: Point) -> str:
    """A point as flags of `tuning train`."""
    return " ".join(configs.flags(point))


def suggested(trial: optuna.Trial, name: str, domain: Domain) -> Any:
    """A parameter's value in a trial."""
    match domain:
        case Choice(values):
            return trial.suggest_categorical(name, values)
        case Integers(low, high):
            return trial.suggest_int(name, low, high)
        case Uniform(low, high, log):
            return trial.suggest_float(name, low, high, log=log)
