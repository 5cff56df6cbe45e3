"""Two methods, three rates each, three seeds, on SST-2: 18 runs. The paths come from the command line; see README.md beside this file."""

from tuning.sweep.space import chain, grid, product, seeds
from tuning.sweep.sweep import Sweep

STEPS = 64


def get_sweep() -> Sweep:
    lora = grid({"method.name": ["lora"], "method.rank": [8], "optimizer.learning_rate": [3e-4, 1e-3, 3e-3]})
    ia3 = grid({"method.name": ["ia3"], "optimizer.learning_rate": [3e-3, 1e-2, 3e-2]})
    config = {
        "model": dict(head="sequence_classification", classes=("negative", "positive"), dropout=0.0),
        "objective": dict(name="labels"),
        "optimizer": dict(schedule=dict(name="linear", warmup_steps=STEPS // 10)),
        "data": {
            "train": dict(columns=("text", "label"), length=32, pack=False, overlong="drop", format=dict(name="labels")),
            "eval": dict(pack=True, length=128),
        },
        "train": dict(steps=STEPS, batch_size=8, log_every=1),
        "eval": dict(every=STEPS // 2),
    }
    return Sweep(config, product(chain(lora, ia3), seeds(3)), measure="eval/accuracy", goal="max")
