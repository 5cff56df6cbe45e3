"""QLoRA: LoRA over a base kept in 4 bits, for a model that does not fit otherwise.

    tuning train --config=configs/qlora.py --config.model.path=MODEL --config.data.train.path=DATA.jsonl --workdir=runs/first

The kernels of all layers take 0.52 bytes per parameter in place of 2; embedding, head and norms stay bfloat16. They are quantised while
they are read, tensor by tensor. The settings are those of the QLoRA paper for 7B and 13B (arXiv:2305.14314, appendix B). Expect a first
loss slightly above the base model's, and a step that takes longer than in bfloat16: each kernel is made from its codes twice.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = dict(name="pretrained", dtype="bfloat16", remat="full", quantise="nf4")
    config.method = dict(name="lora", rank=64, alpha=16.0, dropout=0.1)
    config.optimizer = dict(name="adamw", learning_rate=2e-4, b2=0.999, schedule=dict(name="constant"))
    config.data = dict(train=dict(length=512, pack=True))
    config.train = dict(steps=1875, batch_size=16, clip_norm=0.3)
    config.eval = dict(every=200)
    return config
