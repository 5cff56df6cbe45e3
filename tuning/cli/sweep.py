"""tuning sweep: train many runs that differ in some keys, k at a time, or go on with them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.cli import common, searches

if TYPE_CHECKING:
    from rich.table import Table

    from tuning.core.config import Config
    from tuning.sweep.states import State
    from tuning.sweep.sweep import Cost, Plan, Sweep

EPILOG = """runs:
  --config=FILE.py           what they have in common; --config.SECTION.KEY=VALUE as for train
  --sweep.SECTION.KEY=A,B,C  the values of a key; of several keys, all combinations. A value is written as in Python: ('q','v'),('all',)
  --seeds=N                  each of them with seed 0 to N-1
  --sweep=FILE.py            a file with get_sweep() that returns a Sweep: chained, zipped, conditional and random points too (see
                             tuning/sweep/space.py); --config.KEY, --sweep.KEY and --seeds add to what it says

the directory:
  sweep.json, configs/NAME.json, states/NAME.json (waiting, running, done, failed, pruned), runs/NAME/ as train makes it, workers/ID.log
  The same command goes on with a sweep that was stopped; points may be added. More workers: tuning work DIR.

runners: local (default), slurm, tpu_vm, gke, skypilot; options: tuning/sweep/runners/NAME.py
  --runner=local --workers=K   K at a time; --runner.platform=cpu|cuda|tpu, --runner.devices="0,1;2,3" for two workers on two devices each
  --runner=slurm --runner.partition=P --runner.nodes=2   an array job: K workers of 2 nodes
  --runner=tpu_vm --runner.type=v5litepod-16 --runner.zone=Z --runner.project=P   K slices, asked for and given back
  --runner=gke --runner.image=I --runner.claim=C --runner.accelerator=A --runner.topology=4x4   K JobSets
  --runner=skypilot --runner.accelerators=H100:8 --runner.volume=V   K managed jobs

vectorized: runs that differ in rates, seeds, ranks and other numbers alone are trained as one program over one frozen base, each in its own
  directory as if alone: --vectorize=auto; --dry_run says which ones, and why others are not. It is for adapters, not for full tuning.

{search}
`--dry_run` checks every run, lists them with what they cost, says what would be started, and stops.

examples:
  tuning sweep --config=configs/lora.py ... --sweep.optimizer.learning_rate=1e-5,3e-5,1e-4 --seeds=3 --dir=sweeps/rates --workers=2
  tuning sweep --sweep=experiments/NAME/sweep.py --dry_run
  tuning sweep --config=... "--sweep.optimizer.learning_rate=log_uniform(1e-5,1e-2)" --search=tpe --trials=40 --pruner=median --dir=sweeps/b
""".replace("{search}", searches.EPILOG)


def parser() -> argparse.ArgumentParser:
    p = common.parser("sweep", "Train many runs that differ in some keys. The same command goes on with a sweep that was stopped.", EPILOG)
    p.add_argument("--dir", metavar="DIR", help="the sweep's directory; required unless --dry_run")
    p.add_argument("--sweep", metavar="FILE.py", help="a file with get_sweep()")
    p.add_argument("--seeds", type=int, metavar="N", help="each point with seeds 0 to N-1")
    p.add_argument("--measure", help="by which the runs are compared (default: eval/loss)")
    p.add_argument("--goal", help="which end of it is better, min or max (default: min)")
    p.add_argument("--retries", type=int, metavar="N", help="how many times a failed run is tried again (default: 1)")
    p.add_argument("--retry_failed", action="store_true", help="try again those that failed for good")
    p.add_argument("--vectorize", metavar="off|auto|N", help="runs that differ in numbers alone as programs of up to N (default: off)")
    p.add_argument("--runner", default="local", help="who starts the workers (default: local)")
    p.add_argument("--workers", type=int, default=1, metavar="K", help="how many at a time (default: 1)")
    p.add_argument("--dry_run", action="store_true", help="check and list everything, start nothing")
    searches.add_flags(p)
    return p


def main(argv: list[str]) -> int:
    p = parser()
    if "-h" in argv or "--help" in argv:
        p.parse_args(argv)
    from tuning.cli import flags

    swept, argv = split("--sweep.", argv)
    options, argv = split("--runner.", argv)
    chosen: dict[str, dict[str, str]] = {}
    for part in ("search", "pruner"):
        chosen[part], argv = split(f"--{part}.", argv)
    path, overrides, rest = flags.split(argv)
    args = p.parse_args(rest)
    also = searches.objectives(args)
    if not args.dry_run and not args.dir:
        raise ValueError("sweep needs --dir=DIR for what it writes, or --dry_run.")
    if args.workers < 1:
        raise ValueError(f"--workers={args.workers}: give at least 1.")
    from tuning.sweep import states, sweep
    from tuning.sweep.runners import RUNNERS
    from tuning.sweep.runners.runner import Job, bound
    from tuning.training.progress import console

    directory = Path(args.dir).absolute() if args.dir else Path("DIR")
    runner = bound(RUNNERS, args.runner, options)
    runner(Job(directory, args.workers, lambda text: None, dry_run=True))  # a mistake in its options is found before anything else is done
    searches.refuse(args, chosen, directory)
    before = sweep.load(directory) if (directory / "sweep.json").exists() else None
    made = asked(args, path, overrides, swept)
    if args.search:
        before = before and dataclasses.replace(before, points={}, more=0)
        plan = sweep.plan(searches.corners(made), before)
    else:
        plan = sweep.plan(made, before)
    if args.search and plan.vectorize:
        raise ValueError(f"--search={args.search} suggests one point after the other: set --vectorize=off.")
    runs = sweep.resolve(plan)
    search = searches.asked(args, chosen, also, made, plan, runs, directory) if args.search else None
    standing = states.survey(directory, runs)
    left = {name: config for name, config in runs.items() if standing[name].state in (states.WAITING, states.RUNNING)}
    pretend(args, options, runs)
    costs = sweep.costs(runs if args.dry_run else left, plan.measure)
    job = Job(directory, args.workers, lambda text: console.print(text, markup=False), args.dry_run)
    if args.dry_run:
        console.print(table(plan, standing, costs))
        total = sum(costs[name].flops for name in left)
        said = f"{len(runs)} runs, {len(left)} of them to be made, with {total:.3g} FLOPs; compared by {plan.measure} ({plan.goal})."
        job.say(searches.described(search, costs) if search else said)
        for line in programs(left, plan.vectorize) if plan.vectorize > 1 and left else ():
            job.say(line)
        runner(job)
        job.say("\nDry run: nothing was compiled, loaded, written or started.")
        return 0
    if search:
        return searches.start(directory, plan, search, lambda: runner(job), job.say, waits=args.runner == "local")
    sweep.write(directory, plan, runs)
    if args.retry_failed:
        states.again(directory, runs)
    return runner(job)


def split(prefix: str, argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """({key: text} of the flags PREFIXkey=text, all other arguments)."""
    found, rest, words = {}, [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith(prefix):
            found[flag.removeprefix(prefix)] = value if equals else next(words, "")
        else:
            rest.append(word)
    return found, rest


def asked(args: argparse.Namespace, path: str | None, overrides: Mapping[str, str], swept: Mapping[str, str]) -> Sweep:
    """The sweep that the flags describe."""
    from tuning.cli import flags
    from tuning.sweep import space
    from tuning.sweep.sweep import Sweep

    if args.sweep and path:
        raise ValueError(
            f"--sweep={args.sweep} has a config of its own; change its keys with --config.KEY=VALUE, and leave out --config={path}."
        )
    if args.sweep:
        if not (file := Path(args.sweep)).is_file():
            raise ValueError(f"--sweep={file}: no such file.")
        made = flags.function(file, "get_sweep", "returns a Sweep")()
        if not isinstance(made, Sweep):
            raise ValueError(f"get_sweep() of {file} returned a {type(made).__name__}, not a Sweep.")
    elif path:
        made = Sweep(path, space.product())
    else:
        raise ValueError("sweep needs --config=FILE.py or --sweep=FILE.py.")
    config: Any = flags.read(made.config) if isinstance(made.config, str) else made.config
    config = flags.merge(config.to_dict() if hasattr(config, "to_dict") else config, overrides)
    ranges, swept = searches.ranges(swept)
    spaces = [made.space, *ranges, space.grid(values(config, swept)), *([space.seeds(args.seeds)] if args.seeds is not None else [])]
    given = {key: value for key in ("measure", "goal", "retries") if (value := getattr(args, key)) is not None}
    if args.vectorize is not None:
        given["vectorize"] = largest(args.vectorize)
    return dataclasses.replace(made, config=config, space=space.product(*spaces), **given)


def largest(text: str) -> int:
    """How many runs may be one program, from --vectorize."""
    from tuning.sweep import vectorized

    named = {"off": 0, "auto": vectorized.LARGEST}
    if text not in named and not text.isdecimal():
        raise ValueError(f"--vectorize={text} is neither off, auto nor a whole number.")
    return named[text] if text in named else int(text)


def programs(runs: Mapping[str, Config], most: int) -> Iterator[str]:
    """What --vectorize makes of the runs, a line for each program."""
    from tuning.sweep import vectorized

    names = list(runs)
    for group in vectorized.groups(list(runs.values()), most):
        own = ", ".join(names[i] for i in group.runs)
        yield f"alone, since {group.alone}: {own}" if group.alone else f"{len(group.runs)} in one program: {own}"


def values(config: Mapping[str, Any], swept: Mapping[str, str]) -> dict[str, list[Any]]:
    """{key: its values}, parsed as the key's type. Where the names of parts are swept, a key need belong to one of the parts only."""
    from tuning import build
    from tuning.cli import flags
    from tuning.core import config as configs

    names = {key: apart(text) for key, text in swept.items() if key.endswith(".name")}
    bases = [configs.override(build.SECTIONS, config, dict(zip(names, c, strict=True))) for c in itertools.product(*names.values())]
    return {key: names.get(key) or [_value(flags, bases, key, word) for word in apart(text)] for key, text in swept.items()}


def _value(flags: Any, bases: Sequence[Mapping[str, Any]], key: str, word: str) -> Any:
    from tuning.core import config as configs

    wrong = []
    for base in bases:
        try:
            return configs.dig(flags.merge(base, {key: word}), key)
        except ValueError as error:
            wrong.append(error)
    raise wrong[0]


def apart(text: str) -> list[str]:
    """The values of a list without brackets: commas inside brackets and quotes belong to a value."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found]


def pretend(args: argparse.Namespace, options: Mapping[str, str], runs: Mapping[str, Config]) -> None:
    """The runs are checked on the CPU, with as many devices as a worker has: the real ones are left to the workers."""
    import jax

    from tuning.sweep.runners.local import places

    if args.runner == "local":
        place = places(args.workers, options.get("platform", ""), options.get("devices", ""), os.environ)[0]
        count = None if place.platform == "cpu" else len(place.ids)
    else:  # somewhere else there will be what the meshes name
        count = max(math.prod(max(size, 1) for size in config["mesh"].values()) for config in runs.values())
    with contextlib.suppress(RuntimeError):  # jax has begun already, with the devices that it has
        jax.config.update("jax_platforms", "cpu")
        if count is not None:
            jax.config.update("jax_num_cpu_devices", count)


def table(plan: Plan, standing: Mapping[str, State], costs: Mapping[str, Cost]) -> Table:
    """A line for each run."""
    from rich.table import Table

    made = Table("run", "changes", "state", "trainable params", "bytes that learn", "FLOPs")
    for name, point in plan.points.items():
        changes = " ".join(f"{key}={value!r}" for key, value in point.items())
        cost = costs[name]
        made.add_row(name, changes, standing[name].state, f"{cost.trainable:,}", f"{cost.nbytes:,}", f"{cost.flops:.3g}")
    return made
