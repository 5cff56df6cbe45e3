"""Small runs to plan for, and devices with as much memory as a test wants."""

import dataclasses
import json

from tuning.core.chips import CHIPS
from tuning.plan.topology import Topology

MIB = 2**20
LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
)  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
BERT = dict(
    model_type="bert", architectures=["BertForMaskedLM"], vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=512,
)  # fmt: skip


def config(folder, published=LLAMA, rows=8, **sections):
    """A run of a model of which config.json alone is there."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    made = {
        "model": dict(path=str(folder), dtype="bfloat16"), "method": dict(name="lora"),
        "data": dict(train=dict(length=512)), "train": dict(batch_size=rows, steps=10),
    }  # fmt: skip
    for section, keys in sections.items():
        made[section] = keys if "name" in keys else {**made.get(section, {}), **keys}
    return made


def devices(count, mib, chip="h100"):
    """So many devices of a chip, with other memory than it has."""
    return Topology(f"{chip}:{count}", dataclasses.replace(CHIPS[chip], memory_bytes=int(mib * MIB)), count)
