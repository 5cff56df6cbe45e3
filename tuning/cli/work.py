"""tuning work: take runs of a sweep, one after the other, until none waits. It is what a sweep's runner starts."""

from __future__ import annotations

from pathlib import Path

from tuning.cli import common, processes

EPILOG = """A worker may be started at any time, on any host that sees the directory, and as many of them as there are devices for:
no two take the same run. SIGTERM or Ctrl-C saves the run that is on, and leaves it waiting. A run whose worker died is
taken up again where it was saved.

examples:
  tuning work sweeps/a                                  # one more worker, on this host's devices
  srun tuning work sweeps/a --distributed               # one worker of as many processes as the job has
"""


def main(argv: list[str]) -> int:
    p = common.parser("work", "Take runs of a sweep, one after the other, until none waits.", EPILOG)
    p.add_argument("dir", metavar="DIR", help="the directory that `tuning sweep --dir=DIR` made")
    p.add_argument("--worker", metavar="ID", default="", help="how states/ calls it (default: the host and the process)")
    processes.add_flags(p)
    args = p.parse_args(argv)
    processes.join(args)
    from tuning.sweep import worker

    return worker.work(Path(args.dir).absolute(), args.worker)
