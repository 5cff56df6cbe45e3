"""Routed experts: the published layers, every mesh, and the work they cost."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from transformers.models.mixtral import modeling_mixtral
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from tuning.core import mesh, tree
from tuning.nn import moe

B, T, D, F, E, K = 8, 6, 16, 12, 8, 3
AXES = {
    "router/kernel": ("embed", "router"),
    "gate/kernel": ("experts", "embed", "mlp"),
    "up/kernel": ("experts", "embed", "mlp"),
    "down/kernel": ("experts", "mlp", "embed"),
}


def make(width=D, hidden=F, experts=E, normalize=True):
    with nnx.use_eager_sharding(False):
        return moe.MoE(width, hidden, experts, K, "silu", normalize, range(1), nnx.Rngs(0))


@functools.cache
def setting(experts=E, normalize=True):
    """apply(leaves, x, real) -> (y, sums), leaves and x. No token goes to expert 2, and the others get different numbers of them."""
    graph, state = nnx.eval_shape(lambda: nnx.split(make(experts=experts, normalize=normalize)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)) + 1
    leaves = {n: rng.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5 for n, leaf in tree.flatten(nnx.to_pure_dict(state)).items()}
    leaves["router/kernel"] += rng.normal(size=(1, experts)) / 64
    leaves["router/kernel"][:, 2] = -1
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}

    def apply(leaves, x, real=None):
        params = tree.unflatten(leaves)
        return nnx.merge(graph, params)(x, jnp.ones(x.shape[:2], bool) if real is None else real, None)

    return apply, leaves, jnp.asarray(x, jnp.float32)


def close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(np.asarray(b, np.float32)).max()))),
        a,
        b,
    )


@functools.partial(jax.jit, static_argnums=0)
def all_of(apply, leaves, x, real):
    """(outputs, gradients by leaves and x of a scalar that depends on every output)."""

    def total(leaves, x):
        y, sums = apply(leaves, x, real)
        return (y * wave(x)).sum() + moe.balance(sums).total, (y, sums)

    return jax.grad(total, argnums=(0, 1), has_aux=True)(leaves, x)[::-1]


def wave(x):
    return jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def torch_of(leaves, block):
    """Our leaves in the published layer."""
    t = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    gate, up, down = (leaves[f"{name}/kernel"].swapaxes(1, 2) for name in ("gate", "up", "down"))
    block.load_state_dict(
        {
            "gate.weight": t(leaves["router/kernel"].T),
            "experts.gate_up_proj": t(jnp.concatenate([gate, up], axis=1)),
            "experts.down_proj": t(down),
        }
    )
    return block


def published(name, normalize):
    if name == "mixtral":
        config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
        block = modeling_mixtral.MixtralSparseMoeBlock
    else:
        config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize)
        block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
    config._experts_implementation = "eager"
    return block(config)


@pytest.mark.parametrize("name, normalize", [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_outputs_and_gradients_are_those_of_the_published_layer(name, normalize):
    apply, leaves, x = setting(normalize=normalize)
    (y, _), grads = all_of(apply, leaves, x, jnp.zeros((B, T), bool))  # without real tokens there is no balance

    block = torch_of(leaves, published(name, normalize))
    x_torch = torch.tensor(np.asarray(x), requires_grad=True)
    y_torch = block(x_torch)
    (y_torch * torch.tensor(np.asarray(wave(x)))).sum().backward()
    gate_up = block.experts.gate_up_proj.grad.numpy().swapaxes(1, 2)
    theirs = {
        "router/kernel": block.gate.weight.grad.numpy().T,
        "gate/kernel": gate_up[:, :, :F],
        "up/kernel": gate_up[:, :, F:],
        "down/kernel": block.experts.down_proj.grad.numpy().swapaxes(1, 2),
    }
    counts = np.bincount(block.gate(x_torch.detach().reshape(-1, D))[2].numpy().reshape(-1), minlength=E)
    assert counts[2] == 0 and len(set(counts.tolist())) > 4
    close(y, y_torch.detach().numpy())
    close(grads, (theirs, x_torch.grad.numpy()))
    assert np.abs(theirs["router/kernel"]).max() > 0.1


def test_the_balance_is_the_published_one_and_padding_does_not_count():
    apply, leaves, x = setting()
    real = np.arange(T)[None] < np.arange(1, B + 1)[:, None]
    inputs = [x, x * 0.5 - 0.1]  # what two layers see

    def ours(router):
        sums = [jax.jit(apply)(leaves | {"router/kernel": router}, x, jnp.asarray(real))[1] for x in inputs]
        mean = moe.balance(jax.tree.map(jnp.add, *sums))
        return mean.value, mean

    router = torch.tensor(np.asarray(leaves["router/kernel"].T), requires_grad=True)
    logits = tuple(torch.nn.functional.linear(torch.tensor(np.asarray(x)).reshape(-1, D), router) for x in inputs)
    theirs = modeling_mixtral.load_balancing_loss_func(logits, E, K, torch.tensor(real, dtype=torch.int64))
    theirs.backward()
    (value, mean), grad = jax.value_and_grad(ours, has_aux=True)(leaves["router/kernel"])
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    close(grad, router.grad.numpy().T)
    assert mean.weight == 2 * real.sum() and abs(theirs.item() - K) > 0.05
    sums = [jax.jit(apply)(leaves, x, jnp.asarray(real))[1] for x in (x, jnp.where(jnp.asarray(real)[..., None], x, 7.0))]
    close(*sums, 1e-7)


def test_a_batch_of_padding_has_no_balance():
    apply, leaves, x = setting()
    grads = jax.jit(jax.grad(lambda leaves: moe.balance(apply(leaves, x, jnp.zeros((B, T), bool))[1]).value))(leaves)
    assert all((np.asarray(g) == 0).all() for g in grads.values())


@pytest.mark.parametrize("block", [1, 8, 32])
def test_a_grouped_product_is_each_row_times_its_own_kernel(block):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=(37, size)), jnp.float32) for size in (8, 6))
    kernel = jnp.asarray(rng.normal(size=(5, 8, 6)), jnp.float32)

    def ours(x, kernel, sizes):
        inside = (jnp.arange(37) < sizes.sum())[:, None]
        return jnp.where(inside, moe.grouped((block, "highest"), x, kernel, sizes) * w, 0).sum()

    def dense(x, kernel, one_hot):
        return (jnp.einsum("md,me,edf->mf", x, one_hot, kernel) * w).sum()

    one, other = (jax.jit(jax.value_and_grad(function, (0, 1))) for function in (ours, dense))
    for sizes in ((5, 0, 20, 12, 0), (3, 0, 1, 9, 2), (0, 0, 0, 0, 37), (0, 0, 0, 0, 0)):
        own = np.repeat(np.arange(6), [*sizes, 37 - sum(sizes)])  # 5: no expert
        close(one(x, kernel, jnp.array(sizes)), other(x, kernel, jnp.asarray(own[:, None] == np.arange(5)[None], jnp.float32)))


@pytest.mark.parametrize("contract", [1, 2])
def test_the_products_of_tpu_and_of_other_platforms_are_the_same(contract):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(40, (8, 6)[contract - 1])), jnp.float32)
    kernel, sizes = jnp.asarray(rng.normal(size=(5, 8, 6)), jnp.float32), jnp.array([7, 0, 20, 1, 12])
    close(*(jax.jit(rows, static_argnums=(0, 1))((4, "highest"), contract, x, kernel, sizes) for rows in (moe.rows_loops, moe.rows_native)))


def test_rows_of_experts_elsewhere_may_hold_anything(monkeypatch):
    """The products of TPU promise nothing about rows that belong to no group."""
    _, leaves, x = setting()
    rng = np.random.default_rng(3)
    chosen = jnp.asarray(rng.integers(-3, 9, (B * T, K)))  # experts 0 to 3 are here
    share = jnp.asarray(rng.random((B * T, K)), jnp.float32)
    kernels = [leaves[f"{name}/kernel"][:4] for name in ("gate", "up", "down")]
    run = lambda x, share, *kernels: (moe.mix(moe.How(E, "silu", None), x, share, chosen, *kernels) * wave(x)).sum()  # noqa: E731
    inputs = (x.reshape(-1, D), share, *kernels)
    expected = jax.jit(jax.value_and_grad(run, range(5)))(*inputs)
    rows = moe.rows_loops

    def careless(settings, contract, x, kernel, sizes):
        y = rows(settings, contract, x, kernel, sizes)
        return jnp.where((jnp.arange(len(y)) < sizes.sum())[:, None], y, jnp.nan)

    monkeypatch.setattr(moe, "rows_loops", careless)
    close(jax.jit(jax.value_and_grad(run, range(5)))(*inputs), expected)


@pytest.mark.parametrize("learns", [True, False])
def test_a_piece_of_the_tokens_at_a_time_gives_what_all_of_them_give(monkeypatch, learns):
    rng = np.random.default_rng(4)
    x, share = jnp.asarray(rng.normal(size=(48, D)), jnp.float32), jnp.asarray(rng.random((48, K)), jnp.float32)
    chosen = jnp.asarray(rng.integers(-2, 6, (48, K)))  # of 8 experts, 4 are here
    kernels = [jnp.asarray(rng.normal(size=shape), jnp.float32) / 8 for shape in ((4, D, F), (4, D, F), (4, F, D))]
    monkeypatch.setattr(moe, "ROWS", 1)
    how = moe.How(8, "silu", "highest")
    assert moe.pieces(how, (48, K)) > 1 and 48 % moe.pieces(how, (48, K)) == 0

    def run(form):
        total = lambda x, share, *kernels: (form(how, x, share, chosen, *kernels) * wave(x)).sum()  # noqa: E731
        return jax.make_jaxpr(jax.value_and_grad(total, range(5 if learns else 2)))(x, share, *kernels)

    whole, pieces = run(moe.mix), run(moe.mix_in_pieces)
    close(*(jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x, share, *kernels) for jaxpr in (pieces, whole)))
    rows = f"[{48 * K},{F}]"  # between the projections
    assert rows in str(whole) and rows not in str(pieces)


@pytest.mark.parametrize(("tokens", "count"), [(4096 * 4, 1), (4096 * 4 + 2, 1), (4096 * 32, 8), (4096 * 24, 4), (3 * 2**15 + 2, 2)])
def test_pieces_divide_the_tokens_and_give_an_expert_a_thousand_rows_or_more(tokens, count):
    assert moe.pieces(moe.How(128, "silu", None), (tokens, 8)) == count


def test_a_token_alone_gets_what_it_gets_among_others():
    apply, leaves, x = setting()
    close(jax.jit(apply)(leaves, x[2:3, 4:5])[0], jax.jit(apply)(leaves, x)[0][2:3, 4:5])


MESHES = {
    "data": dict(data=8),
    "expert": dict(data=2, expert=4),
    "expert, fsdp": dict(data=1, fsdp=4, expert=2),
    "expert, tensor": dict(data=2, expert=2, tensor=2),
    "all": dict(data=1, expert=2, fsdp=2, tensor=2),
    "fsdp, tensor": dict(data=1, fsdp=2, tensor=4),
}


CASES = [(name, 8, 8, 1024) for name in MESHES] + [("all", 3, 8, 1024), ("all", 8, 7, 1024), ("expert", 8, 8, 1), ("all", 8, 8, 1)]


@pytest.mark.parametrize("name, rows, experts, at_a_time", CASES)
def test_every_mesh_gives_what_one_device_gives(monkeypatch, name, rows, experts, at_a_time):
    """Rows or experts that a mesh axis does not divide stay whole; rows at a time are gathered at a time."""
    monkeypatch.setattr(moe, "ROWS", at_a_time)
    apply, leaves, x = setting(experts)
    x = x[:rows]
    real = jnp.asarray(np.arange(T)[None] < np.arange(2, rows + 2)[:, None])
    expected = all_of(apply, leaves, x, real)
    where = mesh.mesh(**MESHES[name])
    with jax.set_mesh(where):
        places = {name: NamedSharding(where, mesh.spec(leaf.shape, AXES[name], where)) for name, leaf in leaves.items()}
        rows_place = NamedSharding(where, mesh.spec(x.shape, ("batch", None, None), where))
        placed = {n: jax.device_put(leaf, places[n]) for n, leaf in leaves.items()}
        got = all_of(apply, placed, jax.device_put(x, rows_place), real)
    close(jax.device_get(got), jax.device_get(expected))


def test_experts_are_born_over_their_axes():
    leaves = {"/".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(make()))}
    assert {name: leaf.get_metadata("out_sharding") for name, leaf in leaves.items()} == AXES
    where = mesh.mesh(data=1, expert=2, fsdp=2, tensor=2)
    assert mesh.spec(leaves["down/kernel"].shape, AXES["down/kernel"], where) == PartitionSpec("expert", "tensor", "fsdp")


def test_each_expert_starts_as_a_layer_of_its_own_would():
    layer = make(width=256, hidden=64)
    np.testing.assert_allclose(np.std(layer.up.kernel[...], axis=(1, 2)), 1 / 16, rtol=0.03)
    np.testing.assert_allclose(np.std(layer.down.kernel[...], axis=(1, 2)), 1 / 8, rtol=0.03)
    assert not np.array_equal(layer.up.kernel[0], layer.up.kernel[1])


def test_a_token_cannot_go_to_more_experts_than_there_are():
    with pytest.raises(ValueError, match="per_token=3 experts of 2"):
        make(experts=2)


def stacked(apply, leaves):
    """Two layers in a scan, each made again in the backward pass."""
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.9]), leaves)

    def run(layers, x):
        body = jax.checkpoint(lambda x, leaves: (x + apply(leaves, x)[0], None), prevent_cse=False)
        return jnp.square(jax.lax.scan(body, x, layers)[0]).sum()

    return layers, run


def test_a_scan_with_rematerialisation_has_the_same_gradients():
    apply, leaves, x = setting()
    layers, run = stacked(apply, leaves)

    def unrolled(layers, x):
        for i in range(2):
            x = x + apply(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)[0]
        return jnp.square(x).sum()

    close(jax.jit(jax.grad(run, (0, 1)))(layers, x), jax.jit(jax.grad(unrolled, (0, 1)))(layers, x))


@pytest.mark.parametrize("sizes", [dict(data=1), dict(data=2, expert=2, tensor=2)], ids=["one device", "mesh"])
def test_frozen_experts_cost_no_gradient_of_a_kernel(sizes):
    apply, leaves, x = setting()
    layers, run = stacked(apply, leaves)
    with jax.set_mesh(mesh.over(jax.devices()[: math.prod(sizes.values())], **sizes)):
        of_router = jax.make_jaxpr(jax.grad(lambda router, x: run(layers | {"router/kernel": router}, x), (0, 1)))
        of_all = jax.make_jaxpr(jax.grad(run, (0, 1)))
        loops = [str(jaxpr).count("while[") for jaxpr in (of_router(layers["router/kernel"], x), of_all(layers, x))]
    assert loops[1] - loops[0] == 3, loops


def lowered(apply, leaves, x, **options):
    return jax.jit(jax.grad(lambda leaves, x: apply(leaves, x)[0].sum(), (0, 1))).trace(leaves, x).lower(**options).as_text()


@pytest.mark.parametrize("experts", [8, 64])
def test_no_product_is_larger_than_one_block_of_rows_and_one_expert(experts):
    apply, leaves, x = setting(experts)
    block, rows = moe.block_size(B * T * K, experts), B * T
    shapes = re.findall(r"dot_general .*: \(tensor<(\d+)x(\d+)xf32>, tensor<(\d+)x(\d+)xf32>\)", lowered(apply, leaves, x))
    sizes = {tuple(sorted({int(n) for n in shape})) for shape in shapes}
    router = tuple(sorted({rows, D, experts}))
    assert len(shapes) == 3 + 6 + 3 and sizes == {tuple(sorted({block, D, F})), router}


@pytest.mark.parametrize("seed", range(5))
def test_the_blocks_hold_at_most_twice_the_rows(seed):
    rng = np.random.default_rng(seed)
    sizes = np.bincount(rng.choice(64, 1000, p=rng.dirichlet(np.ones(64) / 4)), minlength=64)
    block = moe.block_size(1000, 64)
    assert block > 1 and (-(-sizes // block) * block).sum() <= 2000


def test_on_tpu_the_products_of_rows_are_native():
    text = lowered(*setting(), lowering_platforms=("tpu",))
    assert text.count('"chlo.ragged_dot"(') == 6  # three kernels, forward and for the gradient of the rows


def test_the_backward_pass_has_the_precision_of_the_forward_pass():
    apply, leaves, x = setting()

    def exact(*inputs):
        with jax.default_matmul_precision("highest"):
            return apply(*inputs)

    with jax.default_matmul_precision("default"):
        text = lowered(exact, leaves, x)
    assert text.count("precision = [HIGHEST, HIGHEST]") == len(re.findall(r"dot_general ", text)) == 12


def test_in_bfloat16_tokens_choose_as_in_float32():
    apply, leaves, x = setting()
    rounded = {name: leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in leaves.items()}
    x = x.astype(jnp.bfloat16)
    (y, sums), (expected, expected_sums) = (jax.jit(apply)(rounded, x) for x in (x, x.astype(jnp.float32)))
    assert y.dtype == jnp.bfloat16
    close(sums, expected_sums, 1e-6)
    assert np.linalg.norm(np.asarray(y, np.float32) - expected) < 2**-7 * np.linalg.norm(expected)


def test_no_device_keeps_the_gathered_kernels_of_all_layers():
    """Without any rematerialisation too: a stack of whole kernels would be the model on every device."""
    layers, width, hidden = 3, 64, 96
    graph, state = nnx.eval_shape(lambda: nnx.split(make(width, hidden)))
    where = mesh.mesh(data=1, fsdp=8)
    place = lambda shape, axes: NamedSharding(where, PartitionSpec(None, *mesh.spec(shape, axes, where)))  # noqa: E731
    stacked = {
        name: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype, sharding=place(x.shape, AXES[name]))
        for name, x in tree.flatten(nnx.to_pure_dict(state)).items()
    }
    x = jax.ShapeDtypeStruct((8, T, width), jnp.float32, sharding=mesh.rows(where))

    def loss(x, weights):
        layer = lambda x, leaves: (x + nnx.merge(graph, tree.unflatten(leaves))(x, jnp.ones(x.shape[:2], bool), None)[0], None)  # noqa: E731
        return jnp.square(jax.lax.scan(layer, x, weights)[0]).sum()

    with jax.set_mesh(where):
        gradient = jax.make_jaxpr(jax.grad(loss))(x, stacked).jaxpr
        text = jax.jit(jax.grad(loss)).lower(x, stacked).compile().as_text()
    assert f"f32[{E},{width},{hidden}]" in text  # one layer's, where it is used
    assert f"f32[{layers},{E},{width},{hidden}]" not in text and f"f32[{layers},{E},{hidden},{width}]" not in text
    # Of what lies between the projections, of all rows: what gate and up give, and nothing that is made from it.
    forward = next(eqn for eqn in gradient.eqns if eqn.primitive.name == "scan")
    assert [leaf.aval.shape for leaf in forward.outvars].count((layers, 8 * T * K, hidden)) == 2
