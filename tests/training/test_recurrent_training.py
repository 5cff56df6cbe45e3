"""Recurrent networks in training: their gradients, the methods, meshes, and what a step costs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import hlo
from tests.recurrents import BOTH, BOTH_GRU, GRU, LM, V, assert_close, build, init, outline, outputs, packed
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.methods import METHODS
from tuning.models.recurrent import RecurrentConfig
from tuning.nn import recurrent
from tuning.objectives import OBJECTIVES
from tuning.training import flops, state, step

# One way to call each method.
SETTINGS = {"full": {}, "partial": {"last_layers": 1}, "lora": {"rank": 3}}


@pytest.mark.parametrize("config, rate", [(dataclasses.replace(LM, layers=1), 0.4), (BOTH_GRU, 0.0)])
def test_the_gradients_are_those_of_differentiating_the_loop_itself(config, rate, monkeypatch):
    method = METHODS["lora"](outline(config), rank=3, dropout=rate, targets=("state",))
    net, batch = build(config, method.sites), packed()
    params = init(net)

    def gradients():
        loss = lambda p: jnp.square(net.apply(p, batch, jax.random.key(7) if rate else None)[0] - 0.5).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    one = gradients()
    monkeypatch.setattr(recurrent, "recur", recurrent.recur.fun)
    for name, expected in tree.flatten(gradients()).items():
        assert_close(tree.flatten(one)[name], expected)
        assert float(jnp.abs(expected).max()) > 1e-3 or name.startswith("head/")


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    plain, other = build(LM), build(dataclasses.replace(LM, remat=remat))
    params, batch = init(plain), packed()
    loss = lambda net: lambda p: jnp.square(net.apply(p, batch)[0]).mean()  # noqa: E731
    one, two = (jax.jit(jax.grad(loss(net)))(params) for net in (plain, other))
    jax.tree.map(assert_close, two, one)


def train(config, method, sizes=None, steps=12):
    """(losses, state before, state after, method, network) of a few steps on a mesh."""
    sizes = sizes or {"data": 1}
    where = meshes.over(jax.devices()[: np.prod(list(sizes.values()))], **sizes)
    chosen = METHODS[method](outline(config), **SETTINGS[method])
    net = build(config, chosen.sites, chosen.cuts)
    transform = optax.adamw(3e-2)
    with jax.set_mesh(where):
        params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
        start = state.start(params, chosen.tuned, transform, where)
        before = jax.device_get(start)
        batch = jax.device_put(packed(classes=len(config.head.classes) or V), meshes.rows(where))
        made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
        compiled, losses = step.jit(made, start, batch), []
        for _ in range(steps):
            start, means = compiled(start, batch)
            losses.append(float(means["loss"].value))
        return losses, before, jax.device_get(start), chosen, net


@functools.cache
def on_one_device(config, method):
    return train(config, method)


@pytest.mark.parametrize("config, method", [(LM, "full"), (GRU, "partial"), (BOTH_GRU, "lora")])
def test_every_method_learns_and_leaves_frozen_leaves_alone(config, method):
    losses, before, after, chosen, net = on_one_device(config, method)
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert all(bool((a != b).any()) for a, b in zip(jax.tree.leaves(before.tuned), jax.tree.leaves(after.tuned), strict=True))
    params = tree.merge(after.tuned, after.frozen)
    said, folded = outputs(net, params, packed())[1], chosen.fold(params)
    assert_close(outputs(build(config), folded, packed())[1], said)


def test_lora_offers_each_projection_of_each_layer_and_direction():
    def adapted(*targets):
        method = METHODS["lora"](outline(BOTH), targets=targets)
        names = tree.flatten(build(BOTH, method.sites).abstract)
        return {n.removesuffix("/adapter/a") for n in names if n.endswith("adapter/a")}

    roles = [f"{way}/{part}" for way in ("forward", "backward") for part in ("input", "state")]
    assert adapted("all") == {f"blocks/{i}-{i}/{role}" for i in range(2) for role in roles}
    assert adapted("state") == {f"blocks/{i}-{i}/{way}/state" for i in range(2) for way in ("forward", "backward")}
    assert adapted("backward/.*") == {f"blocks/{i}-{i}/backward/{part}" for i in range(2) for part in ("input", "state")}


@pytest.mark.parametrize(
    "config, method, sizes", [(LM, "full", {"data": 2, "fsdp": 2, "tensor": 2}), (BOTH_GRU, "lora", {"fsdp": 8})], ids=["full", "lora"]
)
def test_every_mesh_gives_the_losses_of_one_device(config, method, sizes):
    losses, expected = train(config, method, sizes)[0], on_one_device(config, method)[0]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_eight_devices_give_the_same_logits():
    for config in (LM, BOTH):
        net, batch = build(config), packed()
        expected = outputs(net, init(net), batch)[1]
        where = meshes.mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(where):
            params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
            assert not params["blocks"]["0-0"]["forward"]["state"]["kernel"].sharding.is_fully_replicated
            assert_close(outputs(net, params, jax.device_put(batch, meshes.rows(where)))[1], expected)


def test_devices_share_the_arithmetic_and_no_loop_over_time_waits_for_another():
    net, batch = build(LM), packed()
    loss = lambda p, batch: jnp.square(net.apply(p, batch)[0]).sum()  # noqa: E731
    where = meshes.mesh(data=2, fsdp=4)
    with jax.set_mesh(where):
        params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
        text = jax.jit(jax.grad(loss)).lower(params, jax.device_put(batch, meshes.rows(where))).compile().as_text()
    alone = jax.jit(jax.grad(loss)).lower(init(net), batch).compile().as_text()
    assert 8 * hlo.dot_flops(text) <= 1.05 * hlo.dot_flops(alone)
    collective = re.compile(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)")
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside = [line for name in bodies for line in hlo._computations(text)[name][0] if collective.search(line)]
    assert len(bodies) >= 4 and collective.search(text) and inside == []


WIDE = RecurrentConfig(vocab_size=256, width=128, hidden=128, layers=2)


@pytest.mark.parametrize(
    "cell, method, settings", [("lstm", "full", {}), ("gru", "lora", {"rank": 8}), ("lstm", "partial", {"last_layers": 1})]
)
def test_the_compiled_step_makes_no_more_dots_than_the_formula(cell, method, settings):
    config = dataclasses.replace(WIDE, cell=cell)
    chosen = METHODS[method](outline(config), **settings)
    net, transform = build(config, chosen.sites, chosen.cuts), optax.adamw(1e-3)
    layout = state.layout(net.abstract, net.axes, lambda name: "float32", meshes.over(jax.devices()[:1], data=1))
    learns, rests = tree.split(layout, chosen.tuned)
    abstract = state.TrainState(jax.ShapeDtypeStruct((), jnp.int32), learns, rests, jax.eval_shape(transform.init, learns))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed(4, 32))
    made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
    counted = hlo.dot_flops(jax.jit(made).lower(abstract, batch).compile().as_text()) / (4 * 32)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(layout).items()}
    formula = flops.flops_per_token(shapes, chosen.tuned, config.attention_flops(32))
    assert 0.85 * formula <= counted <= 1.15 * formula  # the lowest layer that learns has no input to pass a gradient to


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_every_matmul_has_the_precision_that_the_config_asks_for(precision):
    net, batch = build(dataclasses.replace(BOTH, precision=precision)), packed()

    def loss(params):
        hidden, head, _ = net.apply(params, batch)
        return head(hidden).sum()

    with jax.default_matmul_precision("default"):
        text = jax.jit(jax.grad(loss)).lower(init(net)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    exact = [line for line in dots if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(dots) > 20 and len(exact) == (len(dots) if precision == "highest" else 0)
