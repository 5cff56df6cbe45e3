"""Recurrent networks on disk: a config.json of our own, since no published family has one, and tensors named as torch names them.

The tensors under `rnn.` are the state_dict of torch.nn.LSTM or torch.nn.GRU, those under `embed.` and `head.` of torch.nn.Embedding and
torch.nn.Linear.
"""

from __future__ import annotations

import functools
from typing import Any

from tuning.hub.family import Family, Form, Raw, bare, sorts, speaks
from tuning.hub.names import Row
from tuning.models.heads import HeadConfig
from tuning.models.recurrent import RecurrentConfig

MODEL_TYPE = "tuning_recurrent"

WAYS = {"forward": "", "backward": "_reverse"}  # ours -> the ending of torch's name
PARTS = {"input": "ih", "state": "hh"}  # ours -> a part of torch's name

TABLE = (
    Row("embed/table", "embed.weight"),
    *(
        Row(f"{way}/{part}/{leaf}", f"rnn.{kind}_{short}_l{{layer}}{ending}", transposed=leaf == "kernel")
        for way, ending in WAYS.items()
        for part, short in PARTS.items()
        for leaf, kind in (("kernel", "weight"), ("bias", "bias"))
    ),
)
KERNEL, BIAS = Row("head/kernel", "head.weight", transposed=True), Row("head/bias", "head.bias")
FORMS = {
    "RecurrentForCausalLM": Form(speaks, (KERNEL,)),
    "RecurrentForSequenceClassification": Form(functools.partial(sorts, pool="last", bias=True), (KERNEL, BIAS)),
    "RecurrentMeanForSequenceClassification": Form(functools.partial(sorts, pool="mean", bias=True), (KERNEL, BIAS)),
    "RecurrentForTokenClassification": Form(functools.partial(sorts, bias=True), (KERNEL, BIAS)),
    "RecurrentModel": Form(bare),
}

# config.json -> (field of RecurrentConfig, type)
FIELDS = {
    "vocab_size": ("vocab_size", int), "width": ("width", int), "hidden": ("hidden", int), "layers": ("layers", int),
    "cell": ("cell", str), "bidirectional": ("bidirectional", bool), "dropout": ("dropout", float), "max_length": ("max_length", int),
    "tie_word_embeddings": ("tied", bool),
}  # fmt: skip
# What a config.json may say besides: it belongs to the head, or does not change the network.
OTHERS = (
    "model_type", "architectures", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "dtype", "torch_dtype",
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version",
)  # fmt: skip


def read(raw: Raw) -> RecurrentConfig:
    """ValueError for a key that is missing, not known or of another type: the format is ours, so nothing is passed over."""
    if unknown := [key for key in raw if key not in FIELDS and key not in OTHERS]:
        raise ValueError(f"config.json: {MODEL_TYPE} does not know {', '.join(unknown)}; it knows {', '.join((*FIELDS, *OTHERS))}.")
    for key, (_, kind) in FIELDS.items():
        if type(raw.get(key)) not in ((float, int) if kind is float else (kind,)):
            raise ValueError(f"config.json: {key}={raw.get(key)!r} must be of type {kind.__name__}; {MODEL_TYPE} has no defaults.")
    fields = {field: kind(raw[key]) for key, (field, kind) in FIELDS.items()}
    return RecurrentConfig(**fields, head=HeadConfig(output="hidden"))


def write(c: RecurrentConfig) -> dict[str, Any]:
    """The keys that `read` reads."""
    return {key: getattr(c, field) for key, (field, _) in FIELDS.items()}


FAMILIES = {MODEL_TYPE: Family(FORMS, read, write, TABLE, prefix="", ignored="")}
