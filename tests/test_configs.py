"""Every config that is shipped has keys that exist."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from tuning import build

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_has_keys_that_exist_and_says_its_command(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build.resolve(module.get_config())
    assert "tuning train --config=configs/" in inspect.getdoc(module) or "bash launch/" in inspect.getdoc(module)
