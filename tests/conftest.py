"""Every test sees 8 fake CPU devices, no network, and exact float32."""

import atexit
import gc
import os
import shutil
import tempfile

from tests import devices

os.environ.update(devices.environment())
if "PYTEST_XDIST_WORKER" not in os.environ:
    # All processes of one run of the tests share their compiled programs; what earlier runs left in the user's cache is no part of a test.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tuning-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What shares compiled programs runs in one process: the tests of a file or, where families are the parameter, those of a family."""
    for item in items:
        shared = getattr(getattr(item, "callspec", None), "params", {}).get("family")
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{shared}" if shared else item.path.name))


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """After a file its compiled programs go: each takes some of the memory maps that a process may have (vm.max_map_count on Linux)."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A tiny published model with its tokenizer, and data; see tests/runs.py."""
    from tests import runs

    return runs.make_home(tmp_path_factory.mktemp("home"))
