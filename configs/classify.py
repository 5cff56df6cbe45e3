"""A classifier of texts on a published encoder or decoder, by LoRA and a new head.

    tuning train --config=configs/classify.py --config.model.path=MODEL --config.data.train.path=train.tsv \\
        --config.data.eval.path=dev.tsv --workdir=runs/classify

Data: a tab-separated file without a header, a text and its class (a name, or a number from 0) in each line. Set model.classes to the names
of yours, in the order of their numbers. For the head alone: --config.method.name=partial --config.method.leaves=^head/
Any hardware; on SST-2 with a small sentence encoder see experiments/sst2 for time and accuracy.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = dict(head="sequence_classification", classes=("negative", "positive"))
    config.method = dict(name="lora", rank=8, alpha=16.0)
    config.objective = dict(name="labels")
    config.optimizer = dict(name="adamw", learning_rate=5e-4, schedule=dict(name="linear", warmup_steps=50))
    config.data = dict(train=dict(columns=("text", "label"), length=128, pack=True, format=dict(name="labels")))
    config.train = dict(steps=500, batch_size=16)
    config.eval = dict(every=100)
    return config
