"""Llama-3.1-8B on a pod or on one node of GPUs, by LoRA (default) or fully.

TPU, started on every host of the slice:

    tuning train --config=configs/llama8b.py:lora,v5e:16x16 --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/8b --distributed

8 x H100, one process:

    tuning train --config=configs/llama8b.py:full,h100:8 --config.data.train.path=DATA.jsonl --workdir=runs/8b

Every argument trains the same: 256 rows of 4,096 tokens an update, 1,000 updates. `lora` and `full` alone are the first of their kind.

    lora,v5e:16x16   256 TPU v5e    plan: 2.6 of 15.8 GiB
    lora,v5p:4x4x4   64 TPU v5p     plan: 8.5 of 95.7 GiB
    lora,v6e:8x8     64 TPU v6e     plan: 8.1 of 31.2 GiB, 710,000 tokens/s
    lora,h100:8      8 x H100 80GB  plan: 10.7 of 79.6 GiB, 100,000 tokens/s
    full,v5e:16x16   256 TPU v5e    plan: 5.5 of 15.8 GiB
    full,v5p:4x4x4   64 TPU v5p     plan: 11.9 of 95.7 GiB
    full,v6e:8x8     64 TPU v6e     plan: 11.6 of 31.2 GiB, 490,000 tokens/s
    full,h100:8      8 x H100 80GB  plan: 28.8 of 79.6 GiB, 81,000 tokens/s

Weights are read slice by slice into their shards, so no host holds the model. Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# Microbatches of an update on each topology: one row to four per device at a time.
PLANS = {
    "lora,v5e:16x16": 1, "lora,v5p:4x4x4": 1, "lora,v6e:8x8": 1, "lora,h100:8": 8,
    "full,v5e:16x16": 1, "full,v5p:4x4x4": 1, "full,v6e:8x8": 1, "full,h100:8": 8,
}  # fmt: skip


def get_config(arg: str = "lora") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/llama8b.py:{arg}: the argument is lora, full, or one of {' '.join(PLANS)}.")
    lora = plan.startswith("lora,")
    config = ConfigDict()
    config.model = dict(name="pretrained", path="meta-llama/Llama-3.1-8B", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0) if lora else dict(name="full")
    config.optimizer = dict(name="adamw", learning_rate=2e-4 if lora else 1e-5, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1)
    config.train = dict(steps=1000, batch_size=256, accumulate=PLANS[plan])
    config.eval = dict(every=200)
    return config
