"""Every config that is shipped has keys that exist, and those for real work suit the hardware that they name."""

import importlib.util
import inspect
import math
import re
from pathlib import Path

import pytest

from tuning import build
from tuning.core.chips import CHIPS
from tuning.hub import known

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


def load(path):
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLANNED = {path: module for path in CONFIGS if hasattr(module := load(path), "PLANS")}
PLANS = [(path, plan) for path, module in PLANNED.items() for plan in module.PLANS]


def named(value):
    return value.stem if isinstance(value, Path) else None


def devices(topology):
    """How many JAX devices a topology has: `v5p:4x4x4` has 64."""
    chip, shape = topology.split(":")
    return math.prod(map(int, shape.split("x"))) * CHIPS[chip].devices_per_chip


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_shipped_config_has_keys_that_exist_and_says_its_command(path):
    module = load(path)
    build.resolve(module.get_config())
    assert "tuning train --config=configs/" in inspect.getdoc(module) or "bash launch/" in inspect.getdoc(module)


@pytest.mark.parametrize("path, plan", PLANS, ids=named)
def test_a_plan_resolves_and_its_docstring_names_its_command_and_topology(path, plan):
    module = PLANNED[path]
    config = build.resolve(module.get_config(plan))
    assert config["model"]["path"] in known.KNOWN
    text = inspect.getdoc(module)
    assert re.search(rf"tuning train --config=configs/{path.name}:\w+,\S+ ", text)
    assert re.search(rf"^    {plan} .*plan: \S", text, re.MULTILINE)


@pytest.mark.parametrize("path", PLANNED, ids=named)
def test_the_commands_and_plans_of_a_docstring_are_those_of_the_config(path):
    text, plans = inspect.getdoc(PLANNED[path]), list(PLANNED[path].PLANS)
    assert re.findall(r"^    (\S+) .*plan: ", text, re.MULTILINE) == plans
    assert set(re.findall(rf"configs/{path.name}:(\S+)", text)) <= set(plans)


@pytest.mark.parametrize("path, plan", PLANS, ids=named)
def test_the_mesh_of_a_plan_fits_its_devices_and_splits_its_batch(path, plan):
    config = build.resolve(PLANNED[path].get_config(plan))
    there, sizes = devices(plan.partition(",")[2]), config["mesh"]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    assert there % fixed == 0 and -1 in sizes.values()
    rows = there // (sizes["tensor"] * sizes["context"])
    settings = config["train"]
    assert settings["batch_size"] % settings["accumulate"] == 0
    assert settings["batch_size"] // settings["accumulate"] % rows == 0


@pytest.mark.parametrize("path, plan", PLANS, ids=named)
def test_topologies_change_how_a_run_is_laid_out_and_not_what_it_learns(path, plan):
    """A method alone is the first of its plans; the others differ in mesh and microbatches only."""
    found, first = (build.resolve(PLANNED[path].get_config(arg)) for arg in (plan, plan.partition(",")[0]))
    for config in (found, first):
        del config["mesh"], config["train"]["accumulate"]
    assert repr(found) == repr(first)


@pytest.mark.parametrize("path", PLANNED, ids=named)
@pytest.mark.parametrize("arg", ["", "lor", "lora,v5e", "lora,v5e:1x1", "lora,", "LORA"])
def test_an_argument_that_is_no_plan_is_refused_with_those_there_are(path, arg):
    with pytest.raises(ValueError, match=rf"configs/{path.name}:{arg}: .*{next(iter(PLANNED[path].PLANS))}"):
        PLANNED[path].get_config(arg)
