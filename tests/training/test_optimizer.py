"""Schedules and optimizers: worked values, agreement with torch, what decays, what Muon touches, where the state lives."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tuning.core import mesh, parts, tree
from tuning.training import optimizer as optimizers
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES

always = SCHEDULES["constant"](10)


def leaves(seed=0, layers=3, dtype=jnp.float32):
    numbers = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(numbers.normal(size=shape), dtype)  # noqa: E731
    block = {"attn": {"q": {"kernel": normal(layers, 8, 12), "bias": normal(layers, 12)}}, "attn_norm": {"scale": normal(layers, 8)}}
    block["attn"]["q"]["adapter"] = {"a": normal(layers, 8, 2), "b": normal(layers, 2, 12)}
    return {"embed": {"table": normal(16, 8)}, "blocks": {"0-2": block}, "head": {"kernel": normal(8, 16)}, "norm": {"scale": normal(8)}}


@functools.cache
def stepper(optimizer):
    @jax.jit
    def step(tuned, state, gradient):
        updates, state = optimizer.transform.update(gradient, state, tuned)
        return optax.apply_updates(tuned, updates), state

    return step


def updated(optimizer, tuned, gradients):
    """The leaves after one update per tree of gradients."""
    state = jax.jit(optimizer.transform.init)(tuned)
    for gradient in gradients:
        tuned, state = stepper(optimizer)(tuned, state, gradient)
    return tuned


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("cosine", {"warmup_steps": 10, "final": 0.0}, {0: 0, 5: 0.5, 10: 1, 35: 0.8535534, 60: 0.5, 85: 0.1464466, 110: 0, 200: 0}),
        ("cosine", {"final": 0.1}, {0: 1, 55: 0.55, 110: 0.1, 111: 0.1}),
        ("linear", {"warmup_steps": 10}, {0: 0, 5: 0.5, 10: 1, 60: 0.5, 110: 0, 111: 0}),
        ("linear", {"final": 0.2}, {0: 1, 55: 0.6, 110: 0.2}),
        ("constant", {"warmup_steps": 4}, {0: 0, 1: 0.25, 4: 1, 110: 1}),
        ("constant", {}, {0: 1, 109: 1}),
        ("wsd", {"warmup_steps": 10, "decay_steps": 20, "final": 0.5}, {0: 0, 5: 0.5, 10: 1, 90: 1, 100: 0.75, 110: 0.5}),
        ("wsd", {}, {0: 1, 99: 1, 110: 0}),
    ],
)
def test_schedules_have_these_values(name, settings, expected):
    schedule = SCHEDULES[name](110, **settings)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.array(list(expected), jnp.int32)), list(expected.values()), atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_stays_between_0_and_1_and_refuses_a_warm_up_that_does_not_fit(name):
    values = jax.vmap(SCHEDULES[name](50, warmup_steps=7))(jnp.arange(60))
    assert values.dtype == jnp.float32 and values.min() >= 0 and values.max() == 1
    for warmup_steps in (-1, 50, 51):
        with pytest.raises(ValueError, match=f"warmup_steps={warmup_steps}"):
            SCHEDULES[name](50, warmup_steps=warmup_steps)


def test_settings_of_a_schedule_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="decay_steps=45 do not fit into a run of 50"):
        SCHEDULES["wsd"](50, warmup_steps=10, decay_steps=45)
    with pytest.raises(ValueError, match=r"final=1\.5"):
        SCHEDULES["linear"](50, final=1.5)


@pytest.mark.parametrize("name", [*SCHEDULES, *OPTIMIZERS])
def test_every_part_has_a_default_for_every_key(name):
    part = SCHEDULES.get(name) or OPTIMIZERS[name]
    assert not any(isinstance(value, parts.Required) for value in parts.schema(part).values())
    assert inspect.getdoc(part)


def test_adamw_makes_the_steps_that_a_hand_makes():
    optimizer = OPTIMIZERS["adamw"](always, learning_rate=1e-3)
    w, g = {"w": jnp.zeros(())}, [{"w": jnp.float32(0.3)}, {"w": jnp.float32(-0.1)}]
    # optax computes 1 - b2**count in float32, which is where the sixth digit goes
    np.testing.assert_allclose(updated(optimizer, w, g[:1])["w"], -9.9999997e-4, rtol=1e-5)
    np.testing.assert_allclose(updated(optimizer, w, g)["w"], -9.9999997e-4 - 4.002186e-4, rtol=1e-5)
    decayed = OPTIMIZERS["adamw"](always, learning_rate=1e-3, weight_decay=0.1, decay="w")
    np.testing.assert_allclose(updated(decayed, {"w": jnp.float32(2.0)}, g[:1])["w"], 1.9988, rtol=1e-6)


def test_momentum_makes_the_steps_that_a_hand_makes():
    optimizer = OPTIMIZERS["sgd"](always, learning_rate=0.1, momentum=0.9)
    one = {"w": jnp.ones(())}
    sums = [updated(optimizer, one, [one] * n)["w"] for n in (1, 2, 3)]
    np.testing.assert_allclose(sums, [1 - 0.1, 1 - 0.29, 1 - 0.561], rtol=1e-6)


def test_adamw_agrees_with_torch_over_ten_steps_of_a_warmed_up_cosine():
    torch = pytest.importorskip("torch")
    tuned = {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.arange(3.0)}
    gradients = [jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i + 1), x.shape), tuned) for i in range(10)]
    schedule = SCHEDULES["cosine"](10, warmup_steps=3)
    settings = dict(b1=0.85, b2=0.95, eps=1e-6, weight_decay=0.3)
    ours = updated(OPTIMIZERS["adamw"](schedule, learning_rate=1e-2, **settings), tuned, gradients)
    theirs = {name: torch.nn.Parameter(torch.tensor(np.array(x))) for name, x in tuned.items()}
    groups = [{"params": [theirs["kernel"]], "weight_decay": 0.3}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.85, 0.95), eps=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: float(schedule(step)))
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(np.array(gradient[name]))
        adamw.step()
        scheduler.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic_under_jit(name):
    target, start = leaves(1), leaves(2)
    optimizer = OPTIMIZERS[name](SCHEDULES["cosine"](60, warmup_steps=5), learning_rate=0.3 if name == "muon" else 0.1)
    loss = lambda tuned: sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(target), strict=True)) / 2  # noqa: E731

    @jax.jit
    def run(tuned):
        def step(carry, _):
            updates, state = optimizer.transform.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (tuned, optimizer.transform.init(tuned)), None, 60)[0][0]

    assert loss(run(start)) < 0.15 * loss(start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_update_of_a_warm_up_changes_nothing_and_the_rate_is_known(name):
    optimizer = OPTIMIZERS[name](SCHEDULES["linear"](20, warmup_steps=10), learning_rate=0.5, weight_decay=0.1)
    tuned = leaves(1)
    once = updated(optimizer, tuned, [leaves(2)])
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), once, tuned))
    np.testing.assert_allclose([optimizer.learning_rate(step) for step in (0, 1, 10, 15)], [0, 0.05, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    settings = dict(learning_rate=0.1, weight_decay=0.5)
    tuned = leaves(1)
    zero = jax.tree.map(jnp.zeros_like, tuned)
    after = tree.flatten(updated(OPTIMIZERS[name](always, **settings), tuned, [zero]))
    for leaf, before in tree.flatten(tuned).items():
        shrinks = leaf.split("/")[-1] in ("kernel", "a", "b", "table")
        np.testing.assert_allclose(after[leaf], before * (1 - 0.1 * 0.5) if shrinks else before, rtol=1e-6)


def test_the_leaves_that_decay_are_chosen_by_name():
    tuned = {"norm": {"scale": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
    optimizer = OPTIMIZERS["sgd"](always, learning_rate=0.1, weight_decay=0.5, decay="^norm/")
    after = updated(optimizer, tuned, [jax.tree.map(jnp.zeros_like, tuned)])
    np.testing.assert_allclose(after["norm"]["scale"], 0.95, rtol=1e-6)
    assert (after["head"]["kernel"] == 1).all()


def test_a_decay_that_reaches_no_leaf_is_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0.1, but decay=.* matches none .*: norm/scale"):
        OPTIMIZERS["adamw"](always, weight_decay=0.1).transform.init({"norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"learning_rate=-1"):
        OPTIMIZERS["adamw"](always, learning_rate=-1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_float32_and_leaves_keep_their_dtype(name):
    tuned = leaves(1, dtype=jnp.bfloat16)
    optimizer = OPTIMIZERS[name](always, weight_decay=0.1)
    state = jax.eval_shape(optimizer.transform.init, tuned)
    updates, state = jax.eval_shape(optimizer.transform.update, leaves(2, dtype=jnp.bfloat16), state, tuned)
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}
    after = jax.eval_shape(optax.apply_updates, tuned, updates)
    assert {str(x.dtype) for x in jax.tree.leaves(after)} == {"bfloat16"}


def test_muon_leaves_embeddings_heads_norms_and_biases_to_adam():
    tuned, gradients = leaves(1), [leaves(2), leaves(3)]
    muon, adam = (tree.flatten(updated(OPTIMIZERS[name](always), tuned, gradients)) for name in ("muon", "adamw"))
    same = {name for name in muon if (muon[name] == adam[name]).all()}
    q = "blocks/0-2/attn/q"
    assert set(muon) - same == {f"{q}/kernel", f"{q}/adapter/a", f"{q}/adapter/b"}


def test_muon_on_a_stack_is_muon_on_each_layer():
    stacked, gradients = leaves(1), [leaves(2), leaves(3)]
    together = tree.flatten(updated(OPTIMIZERS["muon"](always, learning_rate=0.1), stacked, gradients))
    alone = OPTIMIZERS["muon"](always, learning_rate=0.1, matrices=r"(kernel|/a|/b)$")
    for layer in range(3):
        one = lambda t, layer=layer: jax.tree.map(lambda x: x[layer], t["blocks"]["0-2"])  # noqa: E731
        for name, leaf in tree.flatten(updated(alone, one(stacked), [one(g) for g in gradients])).items():
            np.testing.assert_allclose(together[f"blocks/0-2/{name}"][layer], leaf, atol=1e-6)


def test_a_muon_step_is_nearly_orthogonal_and_of_adams_size():
    tuned = {"blocks": {"0-0": {"q": {"kernel": jnp.zeros((1, 16, 24))}}}}
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), tuned)
    step = tree.flatten(updated(OPTIMIZERS["muon"](always, learning_rate=1.0), tuned, [gradient]))["blocks/0-0/q/kernel"][0]
    values = jnp.linalg.svd(step, compute_uv=False) / (0.2 * 24**0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert 0.1 < jnp.sqrt(jnp.mean(step**2)) < 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_lives_where_the_leaves_live(name):
    where = mesh.over(jax.devices(), fsdp=8)
    split, whole = NamedSharding(where, PartitionSpec(None, "fsdp")), mesh.replicated(where)
    tuned = jax.eval_shape(lambda: {**leaves(), "big": {"kernel": jnp.zeros((128, 256))}})
    homes = tree.map_named(lambda leaf, _: split if "kernel" in leaf else whole, tuned)
    state = jax.eval_shape(OPTIMIZERS[name](always, weight_decay=0.1).transform.init, tuned)
    placed = optimizers.shardings(state, tuned, homes, whole)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    shapes = {leaf: x.shape for leaf, x in tree.flatten(tuned).items()}
    found = 0
    for (path, leaf), sharding in zip(jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(placed), strict=True):
        twin = next((n for n in shapes if jax.tree_util.keystr(path, simple=True, separator="/").endswith(f"/{n}")), None)
        assert sharding == (tree.flatten(homes)[twin] if twin and leaf.shape == shapes[twin] else whole)
        found += sharding == split
    assert found == {"adamw": 6, "adafactor": 2, "sgd": 3, "lion": 3, "muon": 5}[name]


def test_an_inner_leaf_with_the_end_of_anothers_name_does_not_take_its_sharding():
    tuned = {"q": {"kernel": jnp.zeros((2, 4))}, "kernel": jnp.zeros((2, 4))}
    state = OPTIMIZERS["lion"](always).transform.init(tuned)
    placed = optimizers.shardings(state, tuned, {"q": {"kernel": "inner"}, "kernel": "outer"}, "whole")
    assert sorted(jax.tree.leaves(placed)) == ["inner", "outer", "whole", "whole"]
