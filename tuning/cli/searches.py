"""`tuning sweep --search`: a sweep whose points are suggested, one after the other, by what came of those before."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuning.core.config import Config
    from tuning.sweep.search import Search
    from tuning.sweep.space import Space
    from tuning.sweep.sweep import Cost, Plan, Sweep

EPILOG = """search:
  --search=tpe|gp|cmaes|nsga|random|grid  suggests the points (Optuna); --search.seed=N, --search.startup=N (tpe, gp: trials that are random
                             before it learns), --search.population=N (cmaes, nsga)
  --sweep.KEY="log_uniform(1e-5,1e-2)", "uniform(0,0.5)", "integers(2,64)"  a range in place of values
  --trials=N                 points in all; of several seeds each, the value is their mean. A grid has all its points by default
  --pruner=median|halving|hyperband  ends runs that are worse than others at an evaluation (eval.every); --pruner.factor=3,
                             --pruner.first=STEPS (halving, hyperband), --pruner.startup=5, --pruner.warmup=STEPS (median)
  --measure=eval/loss,params several objectives, for nsga, tpe, gp: the front between them. params, bytes (those that learn) and flops are
                             known before a run and always lowered; the rest is what a run reports (--goal=min,max)
  --storage=URL              a database in place of a journal file, as postgresql+psycopg://USER@HOST/DATABASE with its password in
                             PGPASSWORD; all workers see DIR nevertheless. --study=NAME there (default: the name of DIR)
"""

RANGE = re.compile(r"(log_uniform|uniform|integers)\(([^,]+),([^,]+)\)")


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--search", metavar="SAMPLER", help="suggest the points: tpe, gp, cmaes, nsga, random, grid")
    p.add_argument("--trials", type=int, metavar="N", help="how many points are tried")
    p.add_argument("--pruner", help="end runs early: median, halving, hyperband (default: none)")
    p.add_argument("--storage", metavar="URL", help="a database for the search (default: a file in DIR)")
    p.add_argument("--study", metavar="NAME", help="the search's name in the database (default: the name of DIR)")


def ranges(swept: Mapping[str, str]) -> tuple[list[Space], dict[str, str]]:
    """(the ranges among --sweep.KEY=TEXT, the rest)."""
    from tuning.sweep import space

    found, rest = [], {}
    for key, text in swept.items():
        if match := RANGE.fullmatch(text.replace(" ", "")):
            kind, low, high = match.groups()
            try:
                found.append(getattr(space, kind)(key, *((int if kind == "integers" else float)(end) for end in (low, high))))
            except ValueError as error:
                raise ValueError(f"--sweep.{key}={text}: {error}") from None
        else:
            rest[key] = text
    return found, rest


def objectives(args: argparse.Namespace) -> dict[str, str]:
    """{measure: goal} of --measure and --goal, which keep the first of them for the sweep."""
    measures, goals = (args.measure or "").split(","), (args.goal or "").split(",")
    if len(measures) > 1 and not args.search:
        raise ValueError(f"--measure={args.measure}: runs are compared by one measure. Several are for --search=nsga.")
    if len(goals) > len(measures):
        raise ValueError(f"--goal={args.goal}, and --measure={args.measure}. Give a goal for each measure.")
    args.measure, args.goal = measures[0] or None, goals[0] or None
    goals += ["min"] * (len(measures) - len(goals))
    return dict(zip(measures, goals, strict=True))


def corners(made: Sweep) -> Sweep:
    """The sweep of the points at the ends of a space, by which a search is checked."""
    from tuning.sweep import picks, space

    rest, _ = picks.unseeded(made.space)
    points = [point for point, _ in picks.Parameters(rest).corners()]
    each = [space.product(*(space.choice(key, value) for key, value in point.items())) for point in points]
    return dataclasses.replace(made, space=space.chain(*each))


def asked(args: argparse.Namespace, options: Mapping[str, Mapping[str, str]], also: dict[str, str], made: Sweep, plan: Plan,
          runs: Mapping[str, Config], directory: Path) -> Search:  # fmt: skip
    """The search that the flags describe; `plan` and `runs` are those of its corners."""
    from tuning.sweep import picks, search

    rest, seeds = picks.unseeded(made.space)
    sampler = search.part(search.SAMPLERS, args.search, options["search"], "search")
    if args.trials is None and args.search != "grid":
        raise ValueError(f"--search={args.search} needs --trials=N, how many points it may try.")
    goals = {plan.measure: plan.goal} | {name: goal for name, goal in itertools.islice(also.items(), 1, None)}
    for name, goal in goals.items():
        if goal not in ("min", "max") or (goal == "max" and name in search.COSTS):
            raise ValueError(f"--goal={goal} of {name}: {'it can only be lowered' if name in search.COSTS else 'give min or max'}.")
    found = search.Search(
        rest, seeds, len(picks.Parameters(rest).grid()) if args.trials is None else args.trials, sampler,
        search.part(search.PRUNERS, args.pruner or "none", options["pruner"], "pruner"), goals,
        min(config["eval"]["every"] for config in runs.values()), max(config["train"]["steps"] for config in runs.values()),
        args.storage or "", (args.study or directory.name) if args.storage else "sweep",
    )  # fmt: skip
    search.check(found)
    return found


def described(settings: Search, costs: Mapping[str, Cost]) -> str:
    """The search and what it takes at most, for a dry run."""
    from tuning.sweep import search

    most = max(cost.flops for cost in costs.values()) * settings.trials * (len(settings.seeds) or 1)
    return f"These {len(costs)} points at the ends of the space were checked. {search.described(settings)} At most {most:.3g} FLOPs."


def refuse(args: argparse.Namespace, options: Mapping[str, Mapping[str, str]], directory: Path) -> None:
    """ValueError for flags that do not go together, and for a directory of the other kind."""
    if not args.search:
        given = [name for name in ("trials", "pruner", "storage", "study") if getattr(args, name) is not None]
        if given := [*given, *(f"{part}.{key}" for part, some in options.items() for key in some)]:
            raise ValueError(f"--{given[0]} belongs to a search: set --search=tpe, or leave it out.")
    elif args.retry_failed:
        raise ValueError("--retry_failed: a search has judged those points already. Raise --trials for others.")
    held = (directory / "sweep.json").exists() and (directory / "search.json").exists() != bool(args.search)
    if held:
        raise ValueError(
            f"{directory} holds a sweep whose points are {'listed: leave out --search' if args.search else 'searched: give --search'}, or "
            "choose another --dir."
        )


def start(directory: Path, plan: Plan, settings: Search, run: Callable[[], int], say: Callable[[str], None], waits: bool) -> int:
    """Begins the search, or goes on with it; where its runner `waits` for the end, says what came of it."""
    from tuning.sweep import search, sweep, trials

    directory.mkdir(parents=True, exist_ok=True)
    search.write(directory, settings)  # first: a database that cannot be had leaves no sweep behind
    sweep.write(directory, dataclasses.replace(plan, points={}), {})
    status = run()
    if waits and (found := trials.load(directory)):
        found.settle()
        say(found.report())
    return status
