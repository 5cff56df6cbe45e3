"""Flags of a process that is one of several, and how it joins the others."""

from __future__ import annotations

import argparse


def add_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--distributed", action="store_true", help="one of several processes: of a TPU slice, or a Slurm, MPI or SkyPilot job")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes anywhere else: the address of process 0, and ...")
    p.add_argument("--processes", type=int, help="... how many there are")
    p.add_argument("--process", type=int, help="... and which one this is, from 0")


def join(args: argparse.Namespace) -> None:
    """Waits for the other processes, if there are any."""
    if args.distributed or args.coordinator:
        from tuning.core import distributed

        distributed.join(args.coordinator, args.processes, args.process)
