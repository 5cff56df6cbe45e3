"""LoRA on a published model: the run to start from with your own data.

    tuning train --config=configs/lora.py --config.model.path=MODEL --config.data.train.path=DATA.jsonl --workdir=runs/first

Data: rows with `text`, `prompt` and `completion`, or `messages`. Any hardware; add --config.model.dtype=bfloat16 on GPU and TPU.
Expect a first loss near the base model's on your text, falling within a few dozen steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.method = dict(name="lora", rank=16, alpha=32.0)
    config.optimizer = dict(name="adamw", learning_rate=2e-4, schedule=dict(name="cosine", warmup_steps=20))
    config.data = dict(train=dict(length=1024, pack=True))
    config.train = dict(steps=500, batch_size=8)
    config.eval = dict(every=100)
    return config
