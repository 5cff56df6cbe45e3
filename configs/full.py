"""Full tuning of a published model; the same as configs/lora.py but for the method and its learning rate.

    tuning train --config=configs/full.py --config.model.path=MODEL --config.data.train.path=DATA.jsonl --workdir=runs/full

Memory: 16 bytes per parameter (float32 masters, gradients and two moments), split over config.mesh.fsdp devices.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("lora", Path(__file__).with_name("lora.py"))
    assert spec is not None and spec.loader is not None
    parent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parent)
    config = parent.get_config()
    config.method = dict(name="full")
    config.optimizer.learning_rate = 2e-5
    return config
