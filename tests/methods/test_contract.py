"""What every method keeps to, on every layout of network and every mesh.

By default each pair of a method, a network and a mesh is tried once; `FULL_MATRIX=1` tries all of them.
"""

import dataclasses
import functools
import itertools
import math
import os

import jax
import numpy as np
import pytest
import scipy.special

from tests import checkpoints
from tests.methods.test_methods import AT_ONCE, SETTINGS
from tuning import build, export, weights
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch, Inputs
from tuning.methods import METHODS
from tuning.objectives import OBJECTIVES
from tuning.source import pretrained
from tuning.training import state, step
from tuning.training.checkpoint import Checkpoints
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES, paced

NETWORKS = ("llama3", "gpt2", "bert_masked", "t5")
MESHES = {"one": {}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 4}, "mixed": {"fsdp": 2, "tensor": 2}}
NOWHERE = {("prefix", "t5")}  # its attention is biased by distance
LENGTH, STEPS = 24, 8
TEXT = " ".join(f"{build.__doc__} {weights.start_params.__doc__} {weights.base_params.__doc__}".split())  # whose next letters are learned


def cases():
    every = itertools.product(enumerate(METHODS), enumerate(NETWORKS), enumerate(MESHES))
    chosen = [(m, n, at) for (i, m), (j, n), (k, at) in every if os.environ.get("FULL_MATRIX") or (i + j) % len(MESHES) == k]
    return [case for case in chosen if case[:2] not in NOWHERE]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda family: checkpoints.tiny(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def base_of(folder_of):
    """(network, mesh) -> (where it lies, the network without a method, its logits)."""

    @functools.cache
    def made(family, at):
        source, sizes = pretrained(path=str(folder_of(family))), MESHES[at]
        where = meshes.over(jax.devices()[: math.prod(sizes.values())], **sizes)
        with jax.set_mesh(where):
            plain = build.model(source, METHODS["full"](build.outline(source)), where)
            batch = jax.device_put(batch_of(source, 0), meshes.rows(where))
            return where, plain, np.asarray(logits(plain.network, weights.base_params(plain, lambda _: True, 0), batch))

    return made


def batch_of(source, slots):
    tokens = np.array([ord(character) - 29 for character in TEXT[: 8 * LENGTH]], np.int32).reshape(8, LENGTH)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    counts = ones.astype(np.float32)
    inputs = None
    if source.config.reads == "encoder_decoder":
        inputs = Inputs(tokens, ones, positions)
    else:
        counts[:, : max(slots, 1) - 1] = 0
    counts[:, -1] = 0
    return Batch(tokens, np.roll(tokens, -1, 1), counts, ones, positions, None, inputs)


@jax.jit(static_argnums=0)
def logits(network, params, batch):
    hidden, head, _ = network.apply(params, batch)
    return head(hidden)


def cross_entropy(logits_BTV, batch):
    said = scipy.special.log_softmax(logits_BTV.astype(np.float64), -1)
    targets, weights = np.asarray(batch.targets), np.asarray(batch.weights)
    return -(np.take_along_axis(said, targets[..., None], -1)[..., 0] * weights).sum() / weights.sum()


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize(("name", "family", "at"), cases())
def test_a_method_keeps_its_contract(name, family, at, base_of, tmp_path):
    where, plain, base = base_of(family, at)
    source = plain.source
    with jax.set_mesh(where):
        method = METHODS[name](build.outline(source), **SETTINGS[name])
        m = build.model(source, method, where)
        batch = jax.device_put(batch_of(source, method.slots), meshes.rows(where))
        begun = weights.start_params(m, 0)
        first = np.asarray(logits(m.network, begun, batch))
        if name in AT_ONCE:
            assert np.abs(first - base).max() > 1e-3
        else:
            close(first, base)

        optimizer = paced(
            OPTIMIZERS["adamw"](SCHEDULES["constant"](STEPS), learning_rate=1e-2),
            {n: m.pace(n) for n in tree.flatten(m.layout) if m.tuned(n)},
            STEPS,
        )
        optimizer = dataclasses.replace(optimizer, around=method.around(STEPS))
        now = state.start(begun, m.tuned, optimizer.transform, where)
        frozen, tuned = host(now.frozen), host(now.tuned)
        loss = OBJECTIVES["next_token"]()
        update = step.train_step(
            m.network.apply, loss, optimizer.transform, accumulate=1, clip_norm=1.0, seed=0, begun=optimizer.begun, penalty=method.penalty
        )
        compiled, still = step.jit(update, now, batch), set(tuned)
        for _ in range(STEPS):
            now, _ = compiled(now, batch)
            still -= {n for n, x in host(now.tuned).items() if not np.array_equal(x, tuned[n])}
        params = tree.merge(now.tuned, now.frozen)
        last = np.asarray(logits(m.network, params, batch))
        assert cross_entropy(last, batch) < cross_entropy(first, batch)
        assert all(np.array_equal(x, frozen[n]) for n, x in host(now.frozen).items())
        assert not still, f"{still} never moved"

        keep = Checkpoints(tmp_path)
        keep.save(STEPS, now.tuned, now.optimizer, {})
        keep.wait()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (now.tuned, now.optimizer))
        _, saved, moments, _ = keep.restore("last", *like)
        keep.close()
        for there, here in ((saved, now.tuned), (moments, now.optimizer)):
            assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), there, here))

        if method.fold is not None:
            folded = export.restack(jax.jit(method.fold)(params), plain.layout)
            close(np.asarray(logits(plain.network, folded, batch)), last)


def host(leaves):
    return {name: np.asarray(leaf) for name, leaf in tree.flatten(leaves).items()}
