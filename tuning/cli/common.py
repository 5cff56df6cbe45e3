"""What the verbs share: flags that name a model, and errors as one line instead of a stack trace."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable


def parser(verb: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"tuning {verb}", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that `load` reads."""
    p.add_argument("--model", required=True, metavar="RUN|DIR|ID", help="a run's directory, a published checkpoint's folder, or a hub id")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT directory to put on a published model")
    p.add_argument("--checkpoint", default="best", metavar="best|last|STEP", help="which of a run's checkpoints (default: best)")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights, computation and exported files (default: float32)"
    )
    p.add_argument("--quantise", default="", metavar="KIND", help="keep the kernels of a published model as nf4, int4 or int8")


def load(args: argparse.Namespace):
    """The model that the flags name."""
    from tuning import api

    which = int(args.checkpoint) if args.checkpoint.isdigit() else args.checkpoint
    return api.load(args.model, adapter=args.adapter, dtype=args.dtype, checkpoint=which, quantise=args.quantise)


def report(verb: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a verb. A mistake in what was asked is one line on standard error; TUNING_TRACEBACK=1 shows where it was raised."""
    try:
        return verb(argv)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("TUNING_TRACEBACK"):
            raise
        print(f"tuning: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except Exception as error:
        # Known only where jax is loaded anyway; imported here, it would cost --help its second.
        if type(error).__name__ == "Interrupted" and hasattr(error, "code"):
            print(f"tuning: {error}", file=sys.stderr)
            return error.code  # pyright: ignore[reportAttributeAccessIssue]
        raise
