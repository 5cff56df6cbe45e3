"""The one train step: whatever the accumulation or the mesh, the same update; what is frozen stays, and costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import hlo, tiny
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch
from tuning.methods import METHODS
from tuning.models.transformer import TransformerConfig
from tuning.objectives import OBJECTIVES
from tuning.training import flops, state, step

SETTINGS = {"full": {}, "lora": {"rank": 4}}


def run(method="lora", sizes=None, accumulate=1, steps=3, config=tiny.CONFIG, settings=None, **kw):
    """(losses, state before, state after) of a few steps on a mesh."""
    where = meshes.over(jax.devices()[: np.prod(list((sizes or {"data": 1}).values()))], **(sizes or {"data": 1}))
    chosen = METHODS[method](tiny.outline(config), **(SETTINGS[method] if settings is None else settings))
    net = tiny.build(config, chosen.sites, chosen.cuts)
    transform = optax.adamw(1e-2)
    with jax.set_mesh(where):
        layout = state.layout(net.abstract, net.axes, lambda name: "float32", where)
        start = state.start(state.fresh(net.init, layout, 0), chosen.tuned, transform, where)
        before = jax.device_get(start)
        batches = [jax.device_put(tiny.batch(seed=i), meshes.rows(where)) for i in range(steps)]
        made = step.train_step(
            net.apply, OBJECTIVES["next_token"](), transform, accumulate=accumulate, clip_norm=kw.get("clip", 1.0), seed=0
        )
        compiled = step.jit(made, start, batches[0])
        losses, now = [], start
        for batch in batches:
            now, means = compiled(now, batch)
            losses.append(float(means["loss"].value))
        return losses, before, jax.device_get(now)


@functools.cache
def one_device(method):
    return run(method, steps=20)


def test_accumulation_gives_the_update_of_the_whole_batch():
    whole, pieces = run(accumulate=1), run(accumulate=4)
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pieces[2].tuned, whole[2].tuned)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2}, {"fsdp": 4}, {"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
        {"context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}, {"dcn": 2, "fsdp": 2, "context": 2},
    ],
    ids=str,
)  # fmt: skip
def test_every_mesh_gives_the_losses_of_one_device(method, sizes):
    losses, _, _ = run(method, sizes, steps=20)
    expected, _, _ = one_device(method)
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_the_first_steps_of_adam_do_not_make_much_of_what_meshes_round_otherwise(init):
    settings = {"rank": 4, "init": init}

    def changes(sizes):
        """What the factors of each site come to. Their first steps follow signs, also of what is nearly zero."""
        leaves = tree.flatten(run("lora", sizes, steps=12, settings=settings)[2].tuned)
        return np.concatenate([(a @ leaves[name[:-1] + "b"]).ravel() for name, a in leaves.items() if name.endswith("/a")])

    one = changes(None)
    for sizes in ({"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
        assert np.linalg.norm(changes(sizes) - one) < 1e-4 * np.linalg.norm(one)


def test_accumulation_over_a_mesh_gives_the_same_too():
    np.testing.assert_allclose(run("full", {"data": 2, "fsdp": 2}, accumulate=2)[0], run("full")[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "settings"), [("lora", {"rank": 4}), ("partial", {"last_layers": 1}), ("partial", {"leaves": "scale$"})]
)
def test_frozen_leaves_are_bit_identical_and_have_no_optimizer_state(method, settings):
    _, before, after = run(method, settings=settings)
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.tuned, after.tuned)
    assert all(tree.flatten(changed).values())
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.optimizer) if np.ndim(leaf))
    assert moments == 2 * tree.size(after.tuned)


def test_all_tokens_padded_in_a_microbatch_count_for_nothing():
    net = tiny.build()
    transform = optax.sgd(0.1)
    start = state.start(tiny.init(net), lambda name: True, transform, meshes.over(jax.devices()[:1], data=1))
    batch = tiny.batch(4)
    rows = np.array([1.0, 0.0, 1.0, 0.0], np.float32)[:, None]
    half = Batch(batch.tokens, batch.targets, batch.weights * rows, batch.segments, batch.positions)
    loss = OBJECTIVES["next_token"]()
    one, two = (jax.jit(step.train_step(net.apply, loss, transform, accumulate=n, clip_norm=0.0, seed=0))(start, half)[0] for n in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.tuned, two.tuned)


def test_a_step_that_is_not_finite_changes_nothing_and_says_so():
    net = tiny.build()
    transform = optax.adamw(1e-2)
    params = tree.map_named(lambda n, x: x * jnp.nan if n == "norm/scale" else x, tiny.init(net))
    start = state.start(params, lambda name: True, transform, meshes.over(jax.devices()[:1], data=1))
    made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
    after, means = jax.jit(made)(start, tiny.batch())
    assert float(means["finite"].total) == 0 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.tuned, start.tuned)


def test_the_gradient_is_clipped_by_its_global_norm():
    _, before, after = run("full", steps=1, clip=1e-9)
    free = run("full", steps=1, clip=0.0)[2]
    moment = lambda s: float(optax.global_norm(s.optimizer[0].mu))  # noqa: E731
    assert moment(after) == pytest.approx(0.1 * 1e-9, rel=1e-4) and moment(free) > 1e-3
    assert before is not None


WIDE = TransformerConfig(vocab_size=512, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, hidden=512, max_length=64)


@pytest.mark.parametrize(
    ("method", "settings"), [("full", {}), ("lora", {"rank": 8}), ("partial", {"last_layers": 1}), ("partial", {"leaves": "^head/"})]
)
def test_the_compiled_step_makes_no_more_dots_than_the_formula(method, settings):
    chosen = METHODS[method](tiny.outline(WIDE), **settings)
    net = tiny.build(WIDE, chosen.sites, chosen.cuts)
    transform = optax.adamw(1e-3)
    where = meshes.over(jax.devices()[:1], data=1)
    layout = state.layout(net.abstract, net.axes, lambda name: "float32", where)
    learns, rests = tree.split(layout, chosen.tuned)
    abstract = state.TrainState(jax.ShapeDtypeStruct((), jnp.int32), learns, rests, jax.eval_shape(transform.init, learns))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(4, 64, 512))
    made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
    counted = hlo.dot_flops(jax.jit(made).lower(abstract, batch).compile().as_text()) / (4 * 64)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(layout).items()}
    formula = flops.flops_per_token(shapes, chosen.tuned, WIDE.attention_flops(64))
    assert 0.9 * formula <= counted <= 1.15 * formula
