"""Kernels in few bits: against their definition, qwix, and the bytes of real buffers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tuning.core import mesh
from tuning.nn import quantised
from tuning.nn.quantised import Scales, axes, bytes_per_parameter
from tuning.nn.weight import multiply

quantise = jax.jit(quantised.quantise, static_argnames=("kind", "block", "double"))
dequantise = jax.jit(quantised.dequantise, static_argnames="dtype")
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1: one bit of fraction, two of exponent


@pytest.fixture(autouse=True)
def fp4(monkeypatch):
    """One more kind, to compare with."""
    monkeypatch.setitem(quantised.KINDS, "fp4", quantised.Kind(FP4, 6.0))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.02, jnp.float32)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def plain(kernel, kind, block):
    """The definition, column by column and block by block."""
    levels, bound = np.float32(quantised.KINDS[kind].levels), quantised.KINDS[kind].bound
    out = np.empty_like(kernel)
    for column in range(kernel.shape[1]):
        for start in range(0, kernel.shape[0], block):
            values = kernel[start : start + block, column]
            scale = np.abs(values).max() / np.float32(bound)
            nearest = np.abs(values[:, None].astype(np.float64) / scale - levels).argmin(1)
            out[start : start + block, column] = levels[nearest] * scale
    return out


@pytest.mark.parametrize("kind, block", [("int8", 64), ("int4", 64), ("nf4", 64), ("nf4", 32), ("fp4", 64), ("int8", 3)])
def test_every_value_is_the_nearest_level_times_its_blocks_scale(kind, block):
    kernel = normal(192, 20)
    expected = plain(np.asarray(kernel), kind, block)
    q = quantise(kernel, kind, block)
    assert (q.shape, q.block, q.dtype) == ((192, 20), block, np.float32)
    assert q.codes.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    np.testing.assert_allclose(dequantise(q), expected, rtol=5e-7)
    np.testing.assert_array_equal(dequantise(q, jnp.bfloat16), dequantise(q).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind, theirs", [("int8", jnp.int8), ("int4", jnp.int4), ("nf4", "nf4")])
def test_values_are_those_of_qwix(kind, theirs):
    import qwix

    kernel = normal(256, 96)
    ours, oracle = quantise(kernel, kind), qwix.quantize(kernel, theirs, channelwise_axes=(1,), tiled_axes={0: 64})
    np.testing.assert_array_equal(ours.scales, oracle.scale)
    expected = np.array(qwix.dequantize(oracle))
    if kind != "nf4":
        # A block's largest lies midway between two levels. Where it is negative qwix takes the one below, which we do not have.
        beyond = np.asarray(oracle.qvalue).astype(int) == int(jnp.iinfo(theirs).min)
        assert 0 < beyond.mean() <= 1 / 64
        expected += np.where(beyond, np.repeat(ours.scales, 64, axis=0), 0)
    np.testing.assert_allclose(dequantise(ours), expected, rtol=5e-7)


def test_nf4_is_the_closest_kind_of_4_bits_on_normal_weights():
    kernel = normal(1024, 128)
    error = {
        kind: float(jnp.linalg.norm(dequantise(quantise(kernel, kind)) - kernel) / jnp.linalg.norm(kernel)) for kind in quantised.KINDS
    }
    assert error["int8"] < 0.1 * error["nf4"] < 0.1 * 0.91 * min(error["int4"], error["fp4"]), error
    twice = dequantise(quantise(kernel, "nf4", double=True))
    assert float(jnp.linalg.norm(twice - kernel) / jnp.linalg.norm(kernel)) < 1.001 * error["nf4"]


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_bytes_per_parameter_are_those_of_the_buffers(kind, block, double):
    real = nbytes(quantise(normal(256, 512), kind, block, double)) / (256 * 512)
    assert 0 <= real - bytes_per_parameter(kind, block, double) <= 4 / (256 * 512)  # the mean of the scales


def test_scales_quantised_twice_cost_an_eighth_of_a_bit():
    assert bytes_per_parameter("nf4", 64, True) == pytest.approx(0.515869, abs=1e-6)
    assert 8 * (bytes_per_parameter("nf4", 64, True) - 0.5) == pytest.approx(0.127, abs=1e-4)
    assert bytes_per_parameter("nf4", 64, False) == 0.5625


@pytest.mark.parametrize("outputs", [256, 300])
def test_scales_quantised_twice_are_off_by_half_a_step_at_most(outputs):
    kernel = normal(256, outputs)
    once, twice = quantise(kernel, "nf4"), quantise(kernel, "nf4", double=True)
    np.testing.assert_array_equal(once.codes, twice.codes)
    scales: Scales = twice.scales
    steps = np.repeat(scales.steps, 256, axis=1)[:, :outputs]
    off = np.abs(scales.mean + scales.codes * steps - once.scales)
    assert (off <= 0.5001 * steps + 1e-9).all() and off.max() > 0.3 * steps.max()
    np.testing.assert_allclose(scales.mean, np.mean(once.scales), rtol=5e-3)


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    kernel = normal(128, 8).at[:64, 2].set(0).at[70, 3].set(jnp.inf).at[5, 4].set(jnp.nan)
    for kind in ("int8", "int4", "nf4"):
        values = np.asarray(dequantise(quantise(kernel, kind)))
        assert (values[:64, 2] == 0).all() and np.isfinite(values[:, [0, 1, 2, 5, 6, 7]]).all()
        assert not np.isfinite(values[70, 3]) and not np.isfinite(values[5, 4])
    assert (dequantise(quantise(jnp.zeros((128, 8)), "nf4", double=True)) == 0).all()


@pytest.mark.parametrize(
    "kind, double, dtype",
    [("int8", False, jnp.float32), ("int4", False, jnp.bfloat16), ("nf4", True, jnp.float32), ("nf4", True, jnp.bfloat16)],
)
def test_a_product_and_its_gradient_are_those_of_the_dequantised_kernel(kind, double, dtype):
    q, x, dy = quantise(normal(128, 48), kind, 64, double), normal(2, 5, 128, seed=1).astype(dtype), normal(2, 5, 48, seed=2).astype(dtype)
    kernel = quantised.dequantise(q, dtype)
    y, back = jax.vjp(multiply, x, q)
    dx, dq = back(dy)
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(y, (x.reshape(10, 128) @ kernel).reshape(2, 5, 48))
    np.testing.assert_array_equal(dx, (dy.reshape(10, 48) @ kernel.T).reshape(2, 5, 128))
    assert all(g.dtype == jax.dtypes.float0 or not g.any() for g in jax.tree.leaves(dq))


def test_between_forward_and_backward_only_the_codes_are_kept():
    layers, width, x = 6, 256, normal(4, 256)
    stack = quantise(normal(layers, width, width), "nf4")
    one = jax.tree.map(lambda leaf: leaf[0], stack)
    kept = jax.tree.leaves(jax.vjp(lambda x: multiply(x, one), x)[1])
    assert sorted(leaf.shape for leaf in kept) == sorted(leaf.shape for leaf in jax.tree.leaves(one))

    def temporaries(multiply):
        def total(x, stack):
            return jax.lax.scan(lambda x, q: (jnp.tanh(multiply(x, q)), None), x, stack)[0].sum()

        return jax.jit(jax.grad(total)).lower(x, stack).compile().memory_analysis().temp_size_in_bytes / (4 * width**2)

    # In kernels: those of all layers if each is kept for the backward pass.
    assert temporaries(lambda x, q: x @ dequantise(q)) > layers
    assert temporaries(multiply) < 2
    assert "optimization_barrier" in jax.jit(jax.grad(lambda x: multiply(x, one).sum())).lower(x).as_text()


@pytest.mark.parametrize("double", [False, True])
def test_stacked_kernels_are_quantised_one_by_one(double):
    kernels = normal(2, 3, 128, 40)
    stack = quantise(kernels, "nf4", 64, double)
    assert stack.shape == kernels.shape
    one = quantise(kernels[1, 2], "nf4", 64, double)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[1, 2], stack), one)
    np.testing.assert_array_equal(dequantise(stack)[1, 2], dequantise(one))


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")])
@pytest.mark.parametrize("double", [False, True])
def test_codes_and_scales_are_split_over_devices_as_the_kernel_is(names, double):
    where = mesh.mesh(data=1, fsdp=4, tensor=2)
    kernel, x = normal(2, 512, 1024), normal(8, 512, seed=1)

    def places(tree, names):
        return jax.tree.map(lambda leaf, axes: NamedSharding(where, mesh.spec(leaf.shape, axes, where)), tree, names)

    def run(kernel, x):
        q = quantise(kernel, "nf4", 64, double)
        first = jax.tree.map(lambda leaf: leaf[0], q)
        return q, jax.value_and_grad(lambda x: (multiply(x, first) ** 2).sum())(x)

    alone = jax.jit(run)(kernel, x)
    named = axes(alone[0], ("layers", *names))
    split = places(alone[0], named)
    whole = NamedSharding(where, PartitionSpec())
    given = jax.device_put(kernel, places(kernel, ("layers", *names)))
    with jax.set_mesh(where):
        q, (loss, dx) = jax.jit(run, out_shardings=(split, whole))(given, jax.device_put(x, whole))
    jax.tree.map(np.testing.assert_array_equal, q, alone[0])
    np.testing.assert_allclose(loss, alone[1][0], rtol=1e-5)
    np.testing.assert_allclose(dx, alone[1][1], rtol=1e-4, atol=1e-6)
    blocks, outputs = q.codes.sharding.spec[1], q.codes.sharding.spec[3]
    assert (blocks, outputs) == tuple({"embed": "fsdp", "mlp": "tensor"}[name] for name in names)
    scales = q.scales.codes if double else q.scales
    assert (scales.sharding.spec[1], scales.sharding.spec[2]) == (blocks, outputs)
    assert nbytes([leaf.addressable_shards[0].data for leaf in (q.codes, scales)]) == nbytes([q.codes, scales]) / 8


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")])
def test_over_devices_codes_are_gathered_and_not_values(names):
    where = mesh.mesh(data=1, fsdp=4, tensor=2)
    q, x = quantise(normal(512, 1024), "nf4", double=True), normal(64, 512, seed=1)
    given = jax.tree.map(
        lambda leaf, axes: jax.device_put(leaf, NamedSharding(where, mesh.spec(leaf.shape, axes, where))), q, axes(q, names)
    )
    rows = jax.device_put(x, NamedSharding(where, PartitionSpec("fsdp", "tensor" if names[0] == "mlp" else None)))

    def run(x, q, names=()):
        y, back = jax.vjp(lambda x: multiply(x, q, names), x)
        return y, back(y)[0]

    with jax.set_mesh(where):
        compiled = jax.jit(run, static_argnums=2).lower(rows, given, names).compile()
        got = compiled(rows, given)
    gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    sizes = {dtype: max(math.prod(map(int, shape.split(","))) for kind, shape in gathers if kind == dtype) for dtype, _ in gathers}
    assert sizes["u8"] == 512 * 1024 / 2 / 2 and sizes.get("f32", 0) < 512 * 1024 / 64, gathers
    for ours, expected in zip(got, run(x, q), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(expected).max())))


def test_blocks_that_a_mesh_axis_does_not_divide_stay_whole_in_codes_and_scales():
    where = mesh.mesh(data=1, fsdp=4, tensor=2)
    q = quantise(normal(192, 16), "nf4")  # 4 divides the inputs, and not their 3 blocks
    specs = jax.tree.map(lambda leaf, names: mesh.spec(leaf.shape, names, where), q, axes(q, ("embed", "mlp")))
    assert specs.codes == PartitionSpec(None, None, "tensor") and specs.scales == PartitionSpec(None, "tensor")


def test_what_cannot_be_quantised_says_why():
    with pytest.raises(ValueError, match=r"160 inputs has no whole number of blocks of 64\. Use blocks of 40, or leave"):
        quantise(normal(160, 8), "nf4")
    with pytest.raises(ValueError, match=r"7 inputs has no whole number of blocks of 64\. Leave this kernel"):
        quantise(normal(7, 8), "int4")
    with pytest.raises(ValueError, match=r"Blocks of 7 values.*nf4.*even number"):
        quantise(normal(7, 8), "nf4", 7)
    with pytest.raises(ValueError, match=r"'nf5'\. There are: int8, int4, nf4"):
        quantise(normal(64, 8), "nf5")
