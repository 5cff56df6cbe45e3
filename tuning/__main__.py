"""python -m tuning VERB ...: also the console script `tuning`."""

import sys

VERBS = {
    "plan": "before a run: whether it fits, how fast it goes, what it costs",
    "train": "tune a model by a config, or go on with a run",
    "evaluate": "measure a model on a data split",
    "generate": "continue prompts",
    "prompts": "find the prompt after which a model answers best",
    "export": "write a Hugging Face directory or a PEFT adapter",
    "combine": "several adapters as one",
    "compare": "put runs side by side, over their seeds",
    "reproduce": "train a run again and say whether it is the same",
    "sweep": "train many runs: a grid, seeds, random points",
    "work": "take runs of a sweep until none waits (what a sweep starts)",
}
USAGE = """usage: tuning VERB [--flag=value ...]

Tune language models in JAX.

verbs:
{verbs}

`tuning VERB --help` describes a verb. A first run:

  tuning train --config=configs/lora.py --config.model.path=MODEL --config.data.train.path=DATA.jsonl --workdir=runs/first
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0 done, 1 failed, 2 a mistake in what was asked, 128 + n stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    usage = USAGE.format(verbs="\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items()))
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage)
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        from tuning.core.parts import suggestion

        print(f"tuning: there is no verb {verb!r}.{suggestion(verb, VERBS)} There are: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    import importlib

    from tuning.cli.common import report

    return report(importlib.import_module(f"tuning.cli.{verb}").main, rest)


if __name__ == "__main__":
    sys.exit(main())
