"""tuning combine: several PEFT adapters over one base as one LoRA adapter."""

from __future__ import annotations

from pathlib import Path

from tuning.cli import common

EPILOG = """kinds, as PEFT names them:
  cat                     A and B of all adapters side by side: the exact sum, of the sum of their ranks
  svd                     the sum of the changes, truncated to --svd_rank
  linear                  A and B summed, each by itself; as the next four it needs equal ranks
  ties                    of each adapter the largest share (--density), of these the values with the prevailing sign
  dare_linear, dare_ties  a random share, enlarged, in place of the largest
  magnitude_prune         the largest share, without a vote on signs
  ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                          the same with whole changes in place of A and B, truncated; also of DoRA, LoHa and LoKr

example:
  tuning combine --base=MODEL --adapters=runs/a/exports/peft,runs/b/exports/peft --weights=0.5,0.5 --how=ties --density=0.2 --out=DIR
"""


def main(argv: list[str]) -> int:
    p = common.parser("combine", "Combine PEFT adapters over one base into one LoRA adapter, written as a PEFT directory.", EPILOG)
    p.add_argument("--base", required=True, metavar="DIR|ID", help="the published checkpoint that they adapt")
    p.add_argument("--adapters", required=True, metavar="DIR,DIR", help="PEFT directories")
    p.add_argument("--weights", required=True, metavar="W,W", help="a number for each of them")
    p.add_argument("--how", default="svd", help="(default: svd)")
    p.add_argument("--density", type=float, help="the share of values that is kept, of the kinds that prune")
    p.add_argument("--majority_sign_method", default="total", help="total: the sign of the sum prevails; frequency: that of more values")
    p.add_argument("--svd_rank", type=int, help="the rank of the kinds that end in svd (default: the adapters' largest)")
    p.add_argument("--seed", type=int, default=0, help="of what DARE draws (default: 0)")
    p.add_argument("--out", required=True, metavar="DIR", help="where to")
    args = p.parse_args(argv)
    from tuning import adapted, export
    from tuning.core import tree
    from tuning.methods.combine import Recipe

    recipe = Recipe(args.how, args.density, args.majority_sign_method, args.svd_rank, args.seed)
    made = adapted.combined_directories(args.base, args.adapters.split(","), [float(w) for w in args.weights.split(",")], recipe)
    print(export.write(made.model, tree.unflatten(made.own), made.method, Path(args.out), "peft", merge=False))
    return 0
