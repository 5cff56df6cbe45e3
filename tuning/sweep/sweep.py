"""A sweep: a config, a space of changes to it, and the directory that holds its runs.

DIR/sweep.json         the plan: points by run name, the common config, measure, goal, retries, vectorize
DIR/configs/NAME.json  a run's whole config, for `tuning train --config=FILE.json`
DIR/runs/NAME/         a run's directory, as `tuning train` makes it
DIR/states, DIR/claims, DIR/workers  see states.py; what the workers said
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning import build
from tuning.core import config as configs
from tuning.core import tree
from tuning.core.config import Config
from tuning.plan import cost
from tuning.sweep.names import names
from tuning.sweep.space import Point, Space, points
from tuning.training import state, workdir

GOALS = ("min", "max")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What get_sweep() of a sweep file returns.

    config   what the runs have in common: a nested dict, a ConfigDict, or a config file, as after --config=
    space    how they differ
    measure  by which runs are compared, and goal, which of its ends is the better one: min or max
    retries  how many times a run that failed is tried again, where trying may help
    vectorize  how many runs that differ in numbers alone may be one program (vectorized.py says which can); 0 for none
    """

    config: Mapping[str, Any] | str
    space: Space
    measure: str = "eval/loss"
    goal: str = "min"
    retries: int = 1
    vectorize: int = 0

    def __post_init__(self):
        if self.goal not in GOALS:
            raise ValueError(f"goal={self.goal!r} is not one of {', '.join(GOALS)}.")
        if self.retries < 0:
            raise ValueError(f"retries={self.retries} must be 0 or more.")
        if self.vectorize < 0:
            raise ValueError(f"vectorize={self.vectorize} must be 0 or more.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep whose points have names: what sweep.json holds.

    more  runs that a search may yet add; its points are not in sweep.json but in the files of its trials
    """

    points: dict[str, Point]
    config: Config
    measure: str
    goal: str
    retries: int
    vectorize: int = 0
    more: int = 0


def plan(sweep: Sweep, before: Plan | None = None) -> Plan:
    """The sweep with its runs named. `before`, where its directory holds runs already, keeps the names; there may be new points.

    ValueError for points that are there twice, names that collide, and for a sweep that is another one than before.
    """
    assert not isinstance(sweep.config, str)
    to_dict = getattr(sweep.config, "to_dict", None)
    config = to_dict() if to_dict else dict(sweep.config)
    found = points(sweep.space)
    named = dict(zip(names(found, before.points if before else None), found, strict=True))
    new = Plan(named, config, sweep.measure, sweep.goal, sweep.retries, sweep.vectorize)
    return _going_on(new, before) if before else new


def _going_on(new: Plan, before: Plan) -> Plan:
    """The plan with all points of the one before it, in their order, and those that are new."""
    remedy = "Choose another --dir, or go on as it was begun; points may be added, nothing else changes."
    if difference := configs.first_difference(new.config, before.config, ()):
        raise ValueError(f"The directory holds another sweep: {difference}. {remedy}")
    for what in ("measure", "goal"):
        if getattr(new, what) != getattr(before, what):
            raise ValueError(
                f"The directory holds another sweep: {what}: {getattr(new, what)} here, {getattr(before, what)} there. {remedy}"
            )
    if missing := [name for name in before.points if name not in new.points]:
        raise ValueError(f"The directory holds another sweep: it has the run {missing[0]}, which is no point of this one. {remedy}")
    order = [*before.points, *(name for name in new.points if name not in before.points)]
    return dataclasses.replace(new, points={name: new.points[name] for name in order})


def resolve(plan: Plan) -> dict[str, Config]:
    """{run: its whole config}. ValueError, naming the run, for an unknown key, a value of a wrong type, and two runs that are one."""
    found: dict[str, Config] = {}
    same: dict[str, str] = {}
    for name, point in plan.points.items():
        try:
            found[name] = build.resolve(configs.override(build.SECTIONS, plan.config, point))
            _check_types(found[name], point)
        except ValueError as error:
            raise ValueError(f"Run {name}: {error}") from None
        other = same.setdefault(json.dumps(configs.plain(found[name]), sort_keys=True), name)
        if other != name:
            raise ValueError(f"{other} and {name} are the same run: their points say the same. Leave one out.")
    return found


def _check_types(config: Config, point: Point) -> None:
    kinds, values = configs.kinds(build.SECTIONS, config), configs.flat(config)
    for key, value in point.items():
        if key not in values:
            raise ValueError(f"{key} is no key with a value: it is a section. Set its keys one by one.")
        kind = kinds.get(key) or (str if key.endswith(".name") else int)
        takes = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
        if value is not None and (not isinstance(value, takes) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"{key}={value!r} is not of type {kind.__name__}.")


def write(directory: Path, plan: Plan, configs_of: Mapping[str, Config]) -> None:
    """Makes the sweep's directory, or adds to it. The plan comes last: what it names is there."""
    (directory / "configs").mkdir(parents=True, exist_ok=True)
    for name, config in configs_of.items():
        if not (path := directory / "configs" / f"{name}.json").exists():
            workdir.write_json(path, configs.plain(config))
    workdir.write_json(directory / "sweep.json", {k: v for k, v in configs.plain(dataclasses.asdict(plan)).items() if k != "more"})


def load(directory: Path) -> Plan:
    """The plan in a sweep's directory. FileNotFoundError if there is none."""
    if not (directory / "sweep.json").is_file():
        raise FileNotFoundError(
            f"{directory} is no sweep's directory: it has no sweep.json. `tuning sweep --dir={directory} ...` makes one."
        )
    plan = Plan(**json.loads((directory / "sweep.json").read_text()))
    if not (directory / "search.json").is_file():
        return plan
    search = json.loads((directory / "search.json").read_text())
    trials = [json.loads(path.read_text()) for path in sorted((directory / "trials").glob("*.json"), key=lambda path: int(path.stem))]
    points = {name: point for trial in trials for name, point in trial["points"].items()}
    return dataclasses.replace(plan, points=points, more=max(search["trials"] - len(trials), 0) * (len(search["seeds"]) or 1))


def run_config(directory: Path, name: str) -> Config:
    """A run's whole config."""
    return build.revived(json.loads((directory / "configs" / f"{name}.json").read_text()))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run takes.

    trainable  parameters that learn, and their bytes
    flops      model FLOPs of all its steps
    """

    trainable: int
    nbytes: int
    flops: float


def costs(runs: Mapping[str, Config], measure: str) -> dict[str, Cost]:
    """{run: its cost}, from its parts: every mistake in a config is a ValueError here, naming the run. Nothing is compiled or loaded.

    Runs that differ in the seed and the numbers of the optimizer alone are built once, and their optimizers checked by themselves.
    """
    found: dict[str, Cost] = {}
    built: dict[str, Cost] = {}
    for name, config in runs.items():
        try:
            if (alike := _alike(config)) not in built:
                built[alike] = _cost(build.parts(config), measure)
            bind = functools.partial(configs.bind, build.SECTIONS, config)
            bind("optimizer")(bind("optimizer.schedule")(config["train"]["steps"]))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"Run {name}: {error}") from error
        found[name] = built[alike]
    return found


def _alike(config: Config) -> str:
    """The same text for configs whose parts are the same but for numbers that change no shape and no choice."""
    plain = configs.plain(config)
    optimizer = {key: bool(value) if isinstance(value, float) else value for key, value in configs.flat(plain["optimizer"]).items()}
    return json.dumps({**plain, "seed": 0, "optimizer": optimizer}, sort_keys=True)


def _cost(parts: build.Parts, measure: str) -> Cost:
    split, _, _ = measure.partition("/")
    if split in ("eval", "kept") and split not in parts.held_out:
        raise ValueError(f"{measure} compares the runs, and data.{split} has no path. Set data.{split}.path, or --measure=train/loss.")
    learns = tree.split(parts.model.layout, parts.model.tuned)[0]
    tokens = sum(share * rows.report.tokens / len(rows) for _, rows, share in parts.sources)  # of a row, without padding
    trained = parts.settings.steps * parts.settings.batch_size * tokens
    moving = tree.split(learns, parts.model.moves)[0]
    state.optimizer_layout(parts.optimizer.transform, learns, parts.model.mesh)  # an optimizer checks here which leaves it is for
    return Cost(tree.size(moving), tree.nbytes(learns), cost.flops_per_token(parts) * trained)
