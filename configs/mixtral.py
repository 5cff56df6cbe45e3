"""Mixtral-8x7B, a mixture of 8 experts of which each token uses 2, by LoRA (default) or fully.

TPU, started on every host of the slice:

    tuning train --config=configs/mixtral.py:full,v5p:4x4x4 --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/mixtral --distributed

8 x H100, one process:

    tuning train --config=configs/mixtral.py:lora,h100:8 --config.data.train.path=DATA.jsonl --workdir=runs/mixtral

LoRA's adapters stand at the projections of attention, as in PEFT; full tuning moves router and experts too. Each of 8 devices has one
expert of every layer (mesh.expert), and the 8 share their rows; all else is split as for a dense model. Every argument trains on the same:
256 rows of 4,096 tokens an update, 1,000 updates. `lora` and `full` alone are the first of their kind.

    lora,v5e:16x16   256 TPU v5e    plan: 3.1 of 15.8 GiB
    lora,v5p:4x4x4   64 TPU v5p     plan: 8.5 of 95.7 GiB, 270,000 tokens/s
    lora,v6e:8x8     64 TPU v6e     plan: 8.5 of 31.2 GiB, 370,000 tokens/s
    lora,h100:8      8 x H100 80GB  plan: 26.1 of 79.6 GiB, 41,000 tokens/s
    full,v5p:4x4x4   64 TPU v5p     plan: 23.1 of 95.7 GiB, 190,000 tokens/s

Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# Microbatches of an update on each topology.
PLANS = {"lora,v5e:16x16": 1, "lora,v5p:4x4x4": 1, "lora,v6e:8x8": 1, "lora,h100:8": 4, "full,v5p:4x4x4": 1}


def get_config(arg: str = "lora") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/mixtral.py:{arg}: the argument is lora, full, or one of {' '.join(PLANS)}.")
    lora = plan.startswith("lora,")
    config = ConfigDict()
    config.model = dict(name="pretrained", path="mistralai/Mixtral-8x7B-v0.1", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0) if lora else dict(name="full")
    config.optimizer = dict(name="adamw", learning_rate=2e-4 if lora else 1e-5, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1, expert=8)
    config.train = dict(steps=1000, batch_size=256, accumulate=PLANS[plan])
    config.eval = dict(every=200)
    return config
