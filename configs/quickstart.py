"""The quickstart's three runs: a small base model from scratch, tuned fully and by LoRA. CPU, 2 cores, about 4 minutes in all.

    bash launch/quickstart.sh

runs them one after the other (experiments/quickstart); each alone, once the data is there:

    tuning train --config=configs/quickstart.py:base --workdir=runs/quickstart/base
    tuning train --config=configs/quickstart.py:lora --workdir=runs/quickstart/lora

Expect on held-out pairs: experiments/quickstart/README.md.
"""

from ml_collections import ConfigDict

HOME = "runs/quickstart"
PAIRS = dict(name="pairs", prompt="{prompt}\n")


def get_config(arg: str = "lora") -> ConfigDict:
    if arg == "base":
        return base()
    if arg in ("full", "lora"):
        return tuned(arg)
    raise ValueError(f"configs/quickstart.py:{arg}: the argument is one of base, full, lora.")


def base() -> ConfigDict:
    config = ConfigDict()
    config.model = dict(
        name="decoder", tokenizer=f"{HOME}/tokenizer", width=192, layers=4, heads=6, kv_heads=3, head_dim=32, hidden=512, max_length=512
    )
    config.method = dict(name="full")
    config.data = dict(
        train=dict(path=f"{HOME}/data/text.jsonl", length=256, overlong="split"),
        eval=dict(path=f"{HOME}/data/eval.jsonl", format=PAIRS),
    )
    config.optimizer = dict(name="adamw", learning_rate=3e-3, b2=0.98, weight_decay=0.1, schedule=dict(name="cosine", warmup_steps=20))
    config.train = dict(steps=500, batch_size=4)
    return config


def tuned(method: str) -> ConfigDict:
    config = ConfigDict()
    config.model = dict(name="pretrained", path=f"{HOME}/base/exports/hf")
    config.method = dict(name="lora", rank=16, alpha=32.0) if method == "lora" else dict(name="full")
    config.data = dict(
        train=dict(path=f"{HOME}/data/train.jsonl", length=256, format=PAIRS),
        eval=dict(path=f"{HOME}/data/eval.jsonl"),
    )
    rate = 5e-3 if method == "lora" else 1e-3
    config.optimizer = dict(name="adamw", learning_rate=rate, schedule=dict(name="cosine", warmup_steps=10))
    config.train = dict(steps=250, batch_size=4)
    config.eval = dict(every=125, prompts=("def is_empty(self)\n", "def read_file(path, encoding='utf-8')\n"), max_new_tokens=24)
    return config
