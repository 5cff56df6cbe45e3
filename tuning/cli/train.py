"""tuning train: tune a model by a config, or go on with a run."""

from __future__ import annotations

import sys

from tuning.cli import common, processes

EPILOG = """config:
  --config=FILE.py[:ARG]     a file with get_config(ARG) that returns a ConfigDict; configs/ has one per run we stand behind
  --config.SECTION.KEY=VALUE overrides a key; VALUE is written as in Python ("('q', 'v')", True, 1e-4)

sections: each is a part, chosen by SECTION.name where there is a choice; changing the name resets the section
  model               pretrained (path, head, classes, adapter, dtype, remat, ...), decoder, recurrent (fresh ones)
  method              full, partial, lora, adalora, vera, loha, lokr, ia3, bottleneck, prompt, p_tuning, prefix, tokens
  objective           next_token, labels (for a head that classifies)
  data.train          path, split, length, pack, ...; data.eval the same (what is not set there is taken from data.train)
  data.replay         other text, so that what the model knew is kept: path, share of the rows, ...; data.kept: what of it is held out
  data.train.format   auto, text, pairs, messages, labels (a class for a text), tags (one for each word)
  optimizer           adamw, adafactor, sgd, lion, muon
  optimizer.schedule  constant, linear, cosine, wsd
  mesh                data, fsdp, tensor (sizes; -1 takes the devices that are left)
  train, eval, checkpoint, log, seed

`--dry_run` prints every key with its value.

examples:
  tuning train --config=configs/lora.py --config.model.path=DIR --config.data.train.path=train.jsonl --workdir=runs/a
  tuning train --config=configs/lora.py ... --config.method.rank=8 --config.mesh.fsdp=4 --dry_run
"""


def main(argv: list[str]) -> int:
    p = common.parser("train", "Tune a model by a config. The same command goes on with a run that was stopped.", EPILOG)
    p.add_argument("--workdir", metavar="DIR", help="the run's directory; required unless --dry_run")
    p.add_argument("--dry_run", action="store_true", help="check and show everything, stop before compiling")
    p.add_argument("--compiled", metavar="FILE", help="a train step that `tuning plan --compile --save` stored; trust it as you trust code")
    processes.add_flags(p)
    if "-h" in argv or "--help" in argv:
        p.parse_args(argv)
    from tuning.cli import flags

    path, overrides, rest = flags.split(argv)
    args = p.parse_args(rest)
    if path is None:
        raise ValueError("train needs --config=FILE.py; configs/ has examples.")
    if not args.dry_run and not args.workdir:
        raise ValueError("train needs --workdir=DIR for what it writes, or --dry_run.")
    processes.join(args)
    config = flags.merge(flags.read(path), overrides)
    if args.dry_run:
        from tuning import build
        from tuning.cli import describe

        describe.show(build.parts(config))
        return 0
    import jax

    from tuning import api

    final = api.train(config, args.workdir, argv=[*sys.argv[:2], *argv], compiled=args.compiled)
    if jax.process_index() == 0:
        print("  ".join(f"{name} {value:.6g}" for name, value in final.items() if not name.startswith(("time/", "memory/"))))
    return 0
