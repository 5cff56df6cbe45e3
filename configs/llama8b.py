"""Llama-3.1-8B on a pod or on one node of GPUs, by LoRA (default) or fully.

TPU v5e:16x16, started on every host of the slice:

    tuning train --config=configs/llama8b.py:lora --config.data.train.path=DATA.jsonl --workdir=SHARED/runs/8b --distributed

8 x H100, one process:

    tuning train --config=configs/llama8b.py:full --config.data.train.path=DATA.jsonl --workdir=runs/8b

Weights are read slice by slice into their shards, so no host holds the model. Not yet run on that hardware by us, so no speed is promised;
the train step was compiled ahead of time for v5e:16x16, one row of 4,096 tokens per device, and takes there, of 16 GiB:

    lora  0.4 GiB of arguments, 5.8 GiB of temporaries
    full  0.4 GiB of arguments, 10.7 GiB of temporaries
"""

from ml_collections import ConfigDict


def get_config(arg: str = "lora") -> ConfigDict:
    if arg not in ("full", "lora"):
        raise ValueError(f"configs/llama8b.py:{arg}: the argument is one of full, lora.")
    config = ConfigDict()
    config.model = dict(name="pretrained", path="meta-llama/Llama-3.1-8B", dtype="bfloat16", remat="full")
    config.method = dict(name="lora", rank=16, alpha=32.0) if arg == "lora" else dict(name="full")
    rate = 2e-4 if arg == "lora" else 1e-5
    config.optimizer = dict(name="adamw", learning_rate=rate, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=4096, pack=True))
    config.mesh = dict(data=1, fsdp=-1)
    config.train = dict(steps=1000, batch_size=256)
    config.eval = dict(every=200)
    return config
