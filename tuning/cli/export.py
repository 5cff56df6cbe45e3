"""tuning export: write a Hugging Face directory or a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

from tuning.cli import common


def main(argv: list[str]) -> int:
    p = common.parser("export", "Write a tuned model as others read it.")
    common.add_model_flags(p)
    p.add_argument("--format", default="hf", choices=("hf", "peft"), help="hf: a folder that transformers loads; peft: the adapter alone")
    p.add_argument("--merge", action="store_true", help="fold the adapter into the weights of an hf export")
    p.add_argument("--out", metavar="DIR", help="where to (default: MODEL/exports/FORMAT)")
    p.add_argument("--shard_gb", type=float, default=5.0, help="size beyond which the weights are written as several files (default: 5)")
    args = p.parse_args(argv)
    out = Path(args.out) if args.out else Path(args.model) / "exports" / args.format
    model = common.load(args)
    print(model.export(out, format=args.format, merge=args.merge, shard_bytes=int(args.shard_gb * 1e9)))
    return 0
