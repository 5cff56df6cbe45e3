"""tuning generate: continue prompts."""

from __future__ import annotations

import sys

from tuning.cli import common


def main(argv: list[str]) -> int:
    p = common.parser("generate", "Continue prompts; greedy unless --temperature says otherwise. Each ends at an end token.")
    common.add_model_flags(p)
    p.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; without it, standard input is the prompt")
    p.add_argument("--chat", action="store_true", help="each prompt is a user's message, put into the model's chat template")
    p.add_argument("--max_new_tokens", type=int, default=128, help="(default: 128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest tokens; 0 for all (default)")
    p.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens that hold this probability (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = p.parse_args(argv)
    model = common.load(args)
    prompts = args.prompt or [sys.stdin.read()]
    if args.chat:
        prompts = [model.chat_prompt(text) for text in prompts]
    texts = model.generate(
        prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, special_tokens=not args.chat
    )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        print(text if len(prompts) == 1 else f"{prompt}{text}\n{'-' * 40}")
    return 0
