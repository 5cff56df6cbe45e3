"""Pairs on an encoder-decoder of the T5 family, by LoRA.

    tuning train --config=configs/seq2seq.py --config.model.path=MODEL --config.data.train.path=DATA.csv --workdir=runs/seq2seq

Data: rows with `prompt`, which the encoder reads, and `completion`, which the decoder learns; other columns, or templates over them, with
--config.data.train.format.prompt=mr --config.data.train.format.completion=ref. A decoder takes the same data and `configs/lora.py`.
Any hardware; add --config.model.dtype=bfloat16 on GPU and TPU. The last line is the loss in nats per learned token.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.method = dict(name="lora", rank=16, alpha=32.0)
    config.objective = dict(name="next_token")
    config.optimizer = dict(name="adamw", learning_rate=1e-3, schedule=dict(name="cosine", warmup_steps=50))
    config.data = dict(train=dict(length=128, input_length=256, pack=True, format=dict(name="pairs")))
    config.train = dict(steps=1000, batch_size=16)
    config.eval = dict(every=200)
    return config
