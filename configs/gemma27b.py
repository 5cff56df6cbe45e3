"""Gemma-3-27B, its text model, by LoRA.

TPU, started on every host of the slice:

    tuning train --config=configs/gemma27b.py:lora,v6e:8x8 --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/27b --distributed

8 x H100, one process:

    tuning train --config=configs/gemma27b.py:lora,h100:8 --config.data.train.path=DATA.jsonl --workdir=runs/27b

The published files read images too; that part is neither loaded nor exported. Every argument trains the same: 64 rows of 4,096 tokens an
update, 1,000 updates. `lora` alone is the first.

    lora,v5e:16x16   256 TPU v5e    plan: 4.5 of 15.8 GiB
    lora,v5p:4x4x4   64 TPU v5p     plan: 9.8 of 95.7 GiB, 170,000 tokens/s
    lora,v6e:8x8     64 TPU v6e     plan: 9.9 of 31.2 GiB, 220,000 tokens/s
    lora,h100:8      8 x H100 80GB  plan: 21.5 of 79.6 GiB, 22,000 tokens/s

Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# (pieces that heads, feed-forward layers and vocabulary are split into, microbatches of an update) on each topology. The table of 262,208
# tokens takes 2.6 GiB in bfloat16, too much for a device of 16 GiB beside what a row keeps for the backward pass.
PLANS = {"lora,v5e:16x16": (4, 1), "lora,v5p:4x4x4": (1, 1), "lora,v6e:8x8": (1, 1), "lora,h100:8": (1, 4)}


def get_config(arg: str = "lora") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/gemma27b.py:{arg}: the argument is lora, or one of {' '.join(PLANS)}.")
    tensor, microbatches = PLANS[plan]
    config = ConfigDict()
    config.model = dict(name="pretrained", path="google/gemma-3-27b-pt", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0)
    config.optimizer = dict(name="adamw", learning_rate=2e-4, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    config.train = dict(steps=1000, batch_size=64, accumulate=microbatches)
    config.eval = dict(every=200)
    return config
