"""T5-large on pairs of texts, fully (default) or by LoRA, on a small slice.

    tuning train --config=configs/t5.py:full,v5e:2x4 --config.data.train.path=DATA.csv --workdir=SHARED/runs/t5 --distributed

Data: rows with `prompt`, which the encoder reads, and `completion`, which the decoder learns. Every argument trains on the same: 64 rows
of 512 tokens read and 128 learned an update, 2,000 updates. `full` and `lora` alone are the first of their kind.

    full,v5e:2x4   8 TPU v5e   plan: 2.0 of 15.8 GiB
    full,v5e:2x2   4 TPU v5e   plan: 4.3 of 15.8 GiB
    lora,v5e:2x4   8 TPU v5e   plan: 0.8 of 15.8 GiB
    lora,v5e:2x2   4 TPU v5e   plan: 1.0 of 15.8 GiB

Not yet run on that hardware by us, so no speed is promised.
"""

from ml_collections import ConfigDict

# Microbatches of an update on each topology: 8 rows per device at a time.
PLANS = {"full,v5e:2x4": 1, "full,v5e:2x2": 2, "lora,v5e:2x4": 1, "lora,v5e:2x2": 2}


def get_config(arg: str = "full") -> ConfigDict:
    plan = next((plan for plan in PLANS if f"{plan},".startswith(f"{arg},")), None)
    if plan is None:
        raise ValueError(f"configs/t5.py:{arg}: the argument is full, lora, or one of {' '.join(PLANS)}.")
    lora = plan.startswith("lora,")
    config = ConfigDict()
    config.model = dict(name="pretrained", path="google-t5/t5-large", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0) if lora else dict(name="full")
    config.objective = dict(name="next_token")
    config.optimizer = dict(name="adamw", learning_rate=1e-3 if lora else 1e-4, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=128, input_length=512, pack=True, format=dict(name="pairs")))
    config.mesh = dict(data=1, fsdp=-1)
    config.train = dict(steps=2000, batch_size=64, accumulate=PLANS[plan])
    config.eval = dict(every=200)
    return config
