"""tuning prompts: find the prompt after which a model answers best."""

from __future__ import annotations

import json

from tuning.cli import common

EPILOG = """data:
  The answers of data.eval are scored after each prompt, which is a template with columns in braces:
    tuning prompts --model=DIR --prompt="Question: {question}\\nAnswer:" --prompt="{question}\\n" \\
        --config.data.eval.path=held_out.jsonl --config.data.eval.format.name=pairs --config.data.eval.format.completion=" {answer}"
  --file=FILE has one prompt in each line, with \\n for a line's end. --propose=N asks the model itself for N more: it continues what
  --ask says, once for each, and a continuation counts where it names the columns that the first prompt names.

prints one JSON line for each prompt, the best first: prompt, loss, nll (nats per learned token), perplexity, accuracy, tokens
"""


def main(argv: list[str]) -> int:
    p = common.parser("prompts", "Find the prompt after which a model answers best: the one with the lowest held-out loss.", EPILOG)
    common.add_model_flags(p)
    p.add_argument("--prompt", action="append", default=[], metavar="TEMPLATE", help="a candidate; may be given several times")
    p.add_argument("--file", metavar="FILE", help="candidates, one in each line")
    p.add_argument("--propose", type=int, default=0, metavar="N", help="candidates that the model proposes (default: 0)")
    p.add_argument("--ask", metavar="TEXT", help="what it continues to propose one")
    p.add_argument("--batch_size", type=int, default=8, help="sequences at a time (default: 8)")
    if "-h" in argv or "--help" in argv:
        p.parse_args(argv)
    from tuning.cli import flags

    path, overrides, rest = flags.split(argv)
    args = p.parse_args(rest)
    if bool(args.propose) != bool(args.ask):
        raise ValueError(f"--propose={args.propose} and --ask={args.ask!r} go together.")
    from pathlib import Path

    from tuning import api

    candidates = [*args.prompt, *(Path(args.file).read_text(encoding="utf-8").splitlines() if args.file else [])]
    candidates = [text.replace("\\n", "\n") for text in candidates]
    config, model = flags.merge(flags.read(path) if path else {}, overrides), common.load(args)
    candidates += api.propose_prompts(model, args.ask, args.propose, like=candidates) if args.propose else []
    for prompt, measures in api.rank_prompts(model, config, candidates, args.batch_size):
        print(json.dumps({"prompt": prompt, **measures}, ensure_ascii=False))
    return 0
