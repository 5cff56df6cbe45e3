"""Qwen3-30B-A3B, a mixture of 128 experts of which each token uses 8, by LoRA.

TPU, started on every host of the slice:

    tuning train --config=configs/qwen30b_moe.py:lora,v5e:16x16 --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/30b --distributed

8 x H100, one process:

    tuning train --config=configs/qwen30b_moe.py:lora,h100:8 --config.data.train.path=DATA.jsonl --workdir=runs/30b

Adapters stand at the projections of attention: router and experts stay as they are, as in PEFT. The experts are dealt out over 8 devices
(mesh.expert), which share their rows; all else is split as for a dense model. Every argument trains the same: 256 rows of 4,096 tokens an
update, 1,000 updates. `lora` alone is the first.

    lora,v5e:16x16   256 TPU v5e    plan: 3.7 of 15.8 GiB
    lora,v5p:4x4x4   64 TPU v5p     plan: 7.6 of 95.7 GiB, 870,000 tokens/s
    lora,v6e:8x8     64 TPU v6e     plan: 7.8 of 31.2 GiB, 1,200,000 tokens/s
    lora,h100:8      8 x H100 80GB  plan: 29.5 of 79.6 GiB, 130,000 tokens/s

Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# Microbatches of an update on each topology.
PLANS = {"lora,v5e:16x16": 1, "lora,v5p:4x4x4": 1, "lora,v6e:8x8": 1, "lora,h100:8": 2}


def get_config(arg: str = "lora") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/qwen30b_moe.py:{arg}: the argument is lora, or one of {' '.join(PLANS)}.")
    config = ConfigDict()
    config.model = dict(name="pretrained", path="Qwen/Qwen3-30B-A3B", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0)
    config.optimizer = dict(name="adamw", learning_rate=2e-4, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1, expert=8)
    config.train = dict(steps=1000, batch_size=256, accumulate=PLANS[plan])
    config.eval = dict(every=200)
    return config
