"""Leaves at a pace of their own: the same steps as leaf by leaf, nothing before they begin, over devices and after a stop too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tuning
from tests import runs, tiny
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.methods import METHODS
from tuning.methods.method import Pace
from tuning.objectives import OBJECTIVES
from tuning.training import loop, state, step, writer
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES, paced

PACES = {
    "blocks/0-2/q/kernel": Pace((0.25, 0.5, 1.0), (4, 2, 0)),
    "blocks/0-2/norm/bias": Pace((0.25, 0.5, 1.0), (4, 2, 0)),
    "blocks/3-4/q/kernel": Pace((0.5, 1.0), (3, 3)),  # at different rates, from one step on
    "embed/table": Pace(0.125, 5),
    "head/kernel": Pace(),
}
SHAPES = {"q/kernel": (6, 5), "norm/bias": (5,), "embed/table": (7, 6), "head/kernel": (6, 7)}
STEPS = 8


def numbers(seed):
    """A tree with the leaves of PACES."""
    rng = np.random.default_rng(seed)
    layers = lambda name: (len(PACES[name].rate),) if "blocks/" in name else ()  # noqa: E731
    shape = lambda name: layers(name) + SHAPES["/".join(name.split("/")[-2:])]  # noqa: E731
    return tree.unflatten({name: jnp.asarray(rng.normal(size=shape(name)), jnp.float32) for name in PACES})


def trajectory(optimizer, leaves, gradients):
    """The leaves after each update, compiled once."""
    update = jax.jit(optimizer.transform.update)
    now, found = jax.jit(optimizer.transform.init)(leaves), []
    for gradient in gradients:
        updates, now = update(gradient, now, leaves)
        leaves = optax.apply_updates(leaves, updates)
        found.append(tree.flatten(leaves))
    assert update._cache_size() == 1
    return found


def apart(name, leaf):
    """(rate, begin, layer) of each leaf, or layer, that is optimised on its own."""
    rate, begin = PACES[name]
    return zip(rate, begin, range(len(rate)), strict=True) if isinstance(rate, tuple) else [(rate, begin, ...)]


def test_the_steps_are_those_of_optax_leaf_by_leaf_and_layer_by_layer():
    schedule = SCHEDULES["cosine"](STEPS, warmup_steps=2)
    optimizer = paced(OPTIMIZERS["adamw"](schedule, learning_rate=0.1, weight_decay=0.3), PACES, STEPS)
    gradients = [numbers(seed) for seed in range(1, STEPS + 1)]
    got = trajectory(optimizer, numbers(0), gradients)
    for name, leaf in tree.flatten(numbers(0)).items():
        for rate, begin, layer in apart(name, leaf):
            adam, x = optax.scale_by_adam(), leaf[layer]
            moments = adam.init(x)
            for count, gradient in enumerate(gradients):
                if count >= begin:
                    direction, moments = adam.update(tree.flatten(gradient)[name][layer], moments)
                    pull = 0.3 * x if name.endswith(("kernel", "table")) else 0
                    x = x - 0.1 * schedule(count) * rate * (direction + pull)
                np.testing.assert_allclose(got[count][name][layer], x, rtol=1e-6, atol=1e-6)
            assert float(jnp.abs(x - leaf[layer]).max()) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_every_optimizer_what_begins_later_learns_as_if_the_run_began_there(name):
    made = functools.partial(OPTIMIZERS[name], SCHEDULES["constant"](STEPS))
    gradients = [numbers(seed) for seed in range(1, STEPS + 1)]
    got = trajectory(paced(made(learning_rate=0.1), PACES, STEPS), numbers(0), gradients)
    leaf = "blocks/0-2/q/kernel"
    for rate, begin, layer in apart(leaf, None):
        one = lambda values, layer=layer: tree.unflatten({leaf: tree.flatten(values)[leaf][layer]})  # noqa: E731
        alone = trajectory(made(learning_rate=0.1 * rate), one(numbers(0)), [one(gradient) for gradient in gradients[begin:]])
        for count in range(begin):
            np.testing.assert_array_equal(got[count][leaf][layer], one(numbers(0))["blocks"]["0-2"]["q"]["kernel"])
        for count, expected in enumerate(alone, begin):
            np.testing.assert_allclose(got[count][leaf][layer], expected[leaf], rtol=1e-5, atol=1e-6)


def test_without_a_pace_the_optimizer_and_its_state_are_the_same_as_ever():
    optimizer = OPTIMIZERS["adamw"](SCHEDULES["constant"](STEPS))
    assert paced(optimizer, {"a": Pace(), "b": Pace((1.0, 1.0), (0, 0))}, STEPS) is optimizer
    assert [len(jax.tree.leaves(part)) for part in optimizer.transform.init({"a": jnp.ones(2)})] == [3, 0, 1]


def test_a_leaf_that_would_begin_after_the_run_is_refused():
    optimizer = OPTIMIZERS["adamw"](SCHEDULES["constant"](STEPS))
    with pytest.raises(ValueError, match=r"embed/table would learn from step 5 on only, and train.steps=5. Raise train.steps"):
        paced(optimizer, PACES, 5)
    assert paced(optimizer, PACES, 6) is not optimizer


UNFREEZING = {"unfreeze_every": 2, "layer_decay": 0.9}


@functools.cache
def run(method="full", devices=1, steps=6, cuts=(), eps=1e-8, **settings):
    """(measures of each step, states before and after each step) of a tiny model, at a rate and norm at which clipping acts."""
    where = meshes.over(jax.devices()[:devices], fsdp=devices)
    chosen = METHODS[method](tiny.outline(), **settings)
    net = tiny.build(cuts=chosen.cuts or cuts)
    with jax.set_mesh(where):
        layout = state.layout(net.abstract, net.axes, lambda name: "float32", where)
        optimizer = OPTIMIZERS["adamw"](SCHEDULES["cosine"](12), learning_rate=1e-2, weight_decay=0.1, eps=eps)
        optimizer = paced(optimizer, {name: chosen.pace(name) for name in tree.flatten(layout) if chosen.tuned(name)}, 12)
        now = state.start(state.fresh(net.init, layout, 0), chosen.tuned, optimizer.transform, where)
        make = functools.partial(step.train_step, net.apply, OBJECTIVES["next_token"](), optimizer.transform, begun=optimizer.begun)
        compiled = step.jit(make(accumulate=1, clip_norm=0.5, seed=0), now, jax.device_put(tiny.batch(), meshes.rows(where)))
        measures, states = [], [jax.device_get(now)]
        for i in range(steps):
            now, means = compiled(now, jax.device_put(tiny.batch(seed=i), meshes.rows(where)))
            measures.append({name: float(mean.value) for name, mean in means.items()})
            states.append(jax.device_get(now))
        moments = {leaf.sharding.spec for leaf in jax.tree.leaves(now.optimizer) if leaf.ndim > 2}
    return measures, states, moments


def test_what_does_not_learn_yet_is_bit_identical_and_so_is_its_optimizer_state():
    _, states, _ = run(**UNFREEZING, steps=9)
    leaves = [tree.flatten(s.tuned) for s in states]
    kernels = [leaf["blocks/0-3/mlp/up/kernel"] for leaf in leaves]
    for layer, begin in enumerate((6, 4, 2, 0)):
        for count in range(9):
            assert (kernels[count + 1][layer] == kernels[count][layer]).all() == (count < begin)
    for count in range(9):
        assert (leaves[count + 1]["embed/table"] == leaves[count]["embed/table"]).all() == (count < 8)
        assert (leaves[count + 1]["head/kernel"] != leaves[count]["head/kernel"]).any()
    moment = lambda s: s.optimizer[0].groups["0"]  # noqa: E731
    assert moment(states[4]).mu["blocks"]["0-3"]["mlp"]["up"]["kernel"].any(axis=(1, 2)).tolist() == [False, False, True, True]
    assert moment(states[4]).count.tolist() == [0, 0, 2, 4]


def test_until_the_next_stage_a_run_is_that_of_the_first_stage_alone():
    stage = {"leaves": "^(head|norm)/", "last_layers": 1}
    eps = 1e-3  # with less, Adam makes as much of what two programs round otherwise as of any gradient
    alone, full = run("partial", steps=2, eps=eps, **stage), run(unfreeze_every=2, steps=2, cuts=(3, 4), eps=eps)
    for one, other in zip(alone[0], full[0], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert alone[0][0]["grad_norm"] > 0.5  # the gradient of what does not learn yet has no part in the norm that is clipped
    names, leaves = (tree.flatten(x[1][-1].tuned) for x in (alone, full))
    for name, leaf in names.items():
        np.testing.assert_allclose(leaf, leaves[name], atol=1e-6)


def test_over_eight_devices_it_is_the_same_run_and_the_moments_are_split():
    one, eight = run(**UNFREEZING), run(devices=8, **UNFREEZING)
    for a, b in zip(one[0], eight[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert a["loss"] < one[0][0]["loss"] - 0.01
    for a, b in zip(one[1], eight[1], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a.tuned, b.tuned)
    assert eight[2] and all("fsdp" in spec for spec in eight[2])


class Crash(BaseException):
    """Nothing in the project catches it."""


def test_a_run_that_is_killed_between_two_stages_is_the_same_run(home, tmp_path, monkeypatch):
    config = runs.config(home, method={"name": "full", **UNFREEZING}, eval__every=6, checkpoint__every=3)
    tuning.train(config, tmp_path / "straight")
    original = loop.Clock.tick

    def tick(self, now, means):
        if now == 4:  # the last checkpoint is that of 3: the lower layer began at 2, the embeddings begin at 4
            raise Crash
        original(self, now, means)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop.Clock, "tick", tick)
        tuning.train(config, tmp_path / "run")
    tuning.train(config, tmp_path / "run")
    straight, stopped = (writer.comparable(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert straight == stopped and len(straight) >= 6
