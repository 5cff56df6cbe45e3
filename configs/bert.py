"""BERT-base as a classifier of texts, fully tuned on a small slice.

    tuning train --config=configs/bert.py:full,v5e:2x4 --config.data.train.path=train.tsv --config.data.eval.path=dev.tsv \\
        --workdir=SHARED/runs/bert --distributed

Data: a tab-separated file without a header, a text and its class in each line. Set model.classes to the names of yours. 32 rows of 128
tokens an update, packed with as many texts as they take; each text sees only itself. `full` alone is the first.

    full,v5e:2x4   8 TPU v5e   plan: 1.8 of 15.8 GiB
    full,v5e:2x2   4 TPU v5e   plan: 2.0 of 15.8 GiB

Not yet run on that hardware by us, so no speed is promised. Published for SST-2: 93.5 % on the test set (Devlin et al., 2019,
arXiv:1810.04805, table 1).
"""

from ml_collections import ConfigDict

PLANS = ("full,v5e:2x4", "full,v5e:2x2")  # one config for all: the batch is split over the devices there are


def get_config(arg: str = "full") -> ConfigDict:
    if not any(f"{plan},".startswith(f"{arg},") for plan in PLANS):
        raise ValueError(f"configs/bert.py:{arg}: the argument is full, or one of {' '.join(PLANS)}.")
    config = ConfigDict()
    config.model = dict(
        name="pretrained", path="google-bert/bert-base-uncased", head="sequence_classification", classes=("negative", "positive"),
        dtype="bfloat16",
    )  # fmt: skip
    config.method = dict(name="full")
    config.objective = dict(name="labels")
    config.optimizer = dict(name="adamw", learning_rate=5e-5, weight_decay=0.01, schedule=dict(name="linear", warmup_steps=100))
    config.data = dict(train=dict(columns=("text", "label"), length=128, pack=True, format=dict(name="labels")))
    config.train = dict(steps=1250, batch_size=32)
    config.eval = dict(every=250)
    return config
