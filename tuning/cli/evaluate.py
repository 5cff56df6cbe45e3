"""tuning evaluate: measure a model on a data split."""

from __future__ import annotations

import json

from tuning.cli import common

EPILOG = """data:
  A run is measured on the data.eval of its own config. --config.KEY=VALUE changes keys of it; for a published model it gives them:
    tuning evaluate --model=DIR --config.data.eval.path=held_out.jsonl --config.data.eval.length=512
  --config=FILE.py takes the keys from a config file instead.

prints one JSON line: loss, nll (nats per learned token), perplexity, accuracy, tokens; with --base also base/loss, base/nll, ...
"""


def main(argv: list[str]) -> int:
    p = common.parser("evaluate", "Measure a model on a data split.", EPILOG)
    common.add_model_flags(p)
    p.add_argument("--split", default="eval", choices=("eval", "train", "kept"), help="of the config's data (default: eval)")
    p.add_argument("--base", action="store_true", help="also measure the model as it was before it was tuned")
    p.add_argument("--batch_size", type=int, default=8, help="sequences at a time (default: 8)")
    if "-h" in argv or "--help" in argv:
        p.parse_args(argv)
    from tuning.cli import flags

    path, overrides, rest = flags.split(argv)
    args = p.parse_args(rest)
    from pathlib import Path

    from tuning import api
    from tuning.training import workdir

    run = workdir.is_run(Path(args.model))
    base = flags.read(path) if path else workdir.read_config(Path(args.model)) if run else {}
    print(json.dumps(api.evaluate(common.load(args), flags.merge(base, overrides), args.split, args.batch_size, args.base)))
    return 0
