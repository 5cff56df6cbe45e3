"""tuning reproduce: train a run again from what its directory says, and compare."""

from __future__ import annotations

import sys
from pathlib import Path

from tuning.cli import common

EPILOG = """Exit status: 0 if all lines of metrics are equal, 1 if they are not. The same command goes on with one that was stopped.
A run whose data have changed is not started; RUN/config.json holds its config.
"""


def main(argv: list[str]) -> int:
    p = common.parser("reproduce", "Train a run again from its own directory, and say whether it is the same.", EPILOG)
    p.add_argument("run", metavar="RUN", help="the run's directory")
    p.add_argument("--workdir", metavar="DIR", help="where the new run goes; required unless --dry_run")
    p.add_argument("--dry_run", action="store_true", help="say what differs from the recorded environment, and stop")
    args = p.parse_args(argv)
    if not args.dry_run and not args.workdir:
        raise ValueError("reproduce needs --workdir=DIR for the new run, or --dry_run.")
    if args.workdir and Path(args.workdir).resolve() == Path(args.run).resolve():
        raise ValueError(f"--workdir={args.workdir} is the run itself, which stays as it is. Choose another directory.")
    from tuning.sweep import reproduce

    run = Path(args.run)
    recipe = reproduce.recipe(run)
    print(f"seed {recipe.config['seed']}; data as recorded: " + ", ".join(f"{name} {digest[:12]}" for name, digest in recipe.data.items()))
    print("\n".join([f"Differs from what {run} recorded:", *(f"  {line}" for line in recipe.differences)])
          if recipe.differences else f"Nothing differs from what {run} recorded.")  # fmt: skip
    if args.dry_run:
        return 0
    from tuning import api

    api.train(recipe.config, args.workdir, argv=[*sys.argv[:2], *argv])
    verdict = reproduce.verdict(run, Path(args.workdir))
    if not verdict.unequal:
        print(f"The same run: all {verdict.lines} lines of metrics that {run} has are equal.")
        return 0
    print(f"Not the same run: {verdict.lines} lines of metrics are equal, then not. {verdict.unequal}")
    return 1
