"""Llama-3.3-70B-Instruct by LoRA (default) on a pod, or by QLoRA on a pod or one GPU: LoRA over a base kept in 4 bits (arXiv:2305.14314).

TPU, started on every host of the slice:

    tuning train --config=configs/llama70b.py:lora,v5p:4x4x4 --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/70b --distributed

One H200:

    tuning train --config=configs/llama70b.py:qlora,h200:1 --config.data.train.path=DATA.jsonl --workdir=runs/70b

Every argument trains the same: 64 rows of 4,096 tokens an update, 1,000 updates. `lora` and `qlora` alone are the first of their kind.

    lora,v5e:16x16   256 TPU v5e    plan: 6.9 of 15.8 GiB
    lora,v5p:4x4x4   64 TPU v5p     plan: 12.9 of 95.7 GiB, 64,000 tokens/s
    qlora,v5e:16x16  256 TPU v5e    plan: 6.6 of 15.8 GiB
    qlora,v5p:4x4x4  64 TPU v5p     plan: 11.5 of 95.7 GiB, 64,000 tokens/s
    qlora,h200:1     1 x H200       plan: 67.1 of 139.8 GiB

LoRA over bfloat16 is not for one H200: the weights alone take 131 of its 139 GiB, and a plan refuses it. In 4 bits they take 37 GiB, with
embedding and head still in bfloat16. Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# (pieces that heads and feed-forward layers are split into, microbatches of an update) on each topology. What a row of 4,096 tokens keeps
# for the backward pass is 5 GiB, so that a device of 16 GiB has no room for whole layers beside it.
PLANS = {
    "lora,v5e:16x16": (4, 1), "lora,v5p:4x4x4": (1, 1),
    "qlora,v5e:16x16": (4, 1), "qlora,v5p:4x4x4": (1, 1), "qlora,h200:1": (1, 16),
}  # fmt: skip


def get_config(arg: str = "lora") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/llama70b.py:{arg}: the argument is lora, qlora, or one of {' '.join(PLANS)}.")
    tensor, microbatches = PLANS[plan]
    config = ConfigDict()
    config.model = dict(name="pretrained", path="meta-llama/Llama-3.3-70B-Instruct", dtype="bfloat16", remat="full")
    config.model["quantise"] = "nf4" if plan.startswith("qlora,") else ""
    config.method = dict(name="lora", rank=16, alpha=32.0)
    config.optimizer = dict(name="adamw", learning_rate=1e-4, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1, tensor=tensor)
    config.train = dict(steps=1000, batch_size=64, accumulate=microbatches)
    config.eval = dict(every=200)
    return config
