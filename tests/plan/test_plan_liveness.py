"""The model of what lies in memory, on functions that are small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from tuning.plan import liveness
from tuning.plan.liveness import Buffer

KIB = 1024


def peak(function, *shapes, habits=None):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).jaxpr
    return liveness.peak(jaxpr, habits or liveness.Habits())


def test_buffers_that_never_meet_lie_in_the_same_place():
    assert liveness.packed([Buffer(0.0, 0.5, 8), Buffer(0.5, 1.0, 6)]) == 8
    assert liveness.packed([Buffer(0.0, 0.6, 8), Buffer(0.5, 1.0, 6)]) == 14


def test_a_gap_that_nothing_fits_in_is_lost():
    whole, early, bridge, late = Buffer(0.0, 1.0, 1), Buffer(0.0, 0.6, 4), Buffer(0.4, 0.95, 2), Buffer(0.6, 0.95, 5)
    assert liveness.packed([whole, early, late]) == 1 + 5
    assert liveness.packed([whole, early, bridge, late]) == 1 + 4 + 2 + 5  # what is early has left 4, between the whole and the bridge
    assert liveness.packed([whole, early, bridge, late._replace(nbytes=3)]) == 1 + 4 + 2


def test_what_is_computed_element_by_element_takes_no_room_of_its_own():
    matrix = ((64, 64), jnp.float32)  # 16 KiB
    assert peak(lambda x: (jnp.tanh(x @ x) * 2 + 1) @ x, matrix).bytes == pytest.approx(32 * KIB)  # the result, and what goes into it


def test_heads_made_wider_for_two_readers_are_kept_wide():
    def function(x, w):
        heads = (x @ w).reshape(2, 32, 2, 64)
        small = heads.astype(jnp.float32).sum((0, 1, 3))
        between = w @ w  # while the first reader is done
        return small, between, (heads.astype(jnp.float32) * 2).sum((0, 1, 3))

    shapes = ((64, 128), jnp.bfloat16), ((128, 128), jnp.bfloat16)
    assert peak(function, *shapes).bytes >= 2 * 32 * 2 * 128 * 4 + 128 * 128 * 2  # heads of 64 are filled up to lanes


def test_a_stack_of_what_was_made_wider_is_kept_narrow():
    def function(x):
        def body(y, _):
            y = y @ y
            return y, y.astype(jnp.float32)

        def back(total, piece):
            return total + piece, None

        stacked = jax.lax.scan(body, x, None, 8)[1]
        return jax.lax.scan(back, jnp.zeros((64, 64)), stacked)[0]

    assert peak(function, ((64, 64), jnp.bfloat16)).kept == 8 * 64 * 64 * 2


def test_a_matrix_that_comes_shard_by_shard_is_there_in_part():
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    shapes = ((8, 256), jnp.float32), ((4, 256, 256), jnp.float32)
    whole, part = (peak(function, *shapes, habits=liveness.Habits(1.0, share)).bytes for share in (1.0, 0.75))
    assert whole - part == pytest.approx(64 * KIB)


def test_products_by_experts_give_their_place_to_what_is_computed_from_them():
    rows, kernel = ((64, 64), jnp.float32), ((4, 64, 64), jnp.float32)

    def function(x, kernel, sizes):
        product = lambda: jax.lax.cond(sizes[0] > 0, jax.lax.ragged_dot, lambda x, *_: x, x, kernel, sizes)  # noqa: E731
        gate, up, down = product(), product(), product()
        one, other = down * gate, down * up  # the other ends two of them
        return one @ x, other @ x, gate.sum()

    assert peak(function, rows, kernel, ((4,), jnp.int32)).bytes == pytest.approx(4 * 16 * KIB, rel=0.02)


def test_a_kernel_in_codes_is_an_array_where_experts_multiply_by_it():
    def function(x, codes, sizes):
        return jax.lax.ragged_dot(x, codes.astype(jnp.float32) / 8, sizes).sum()

    shapes = ((64, 64), jnp.float32), ((4, 64, 64), jnp.int8), ((4,), jnp.int32)
    assert peak(function, *shapes).bytes == pytest.approx((4 * 16 + 16) * KIB, rel=0.02)  # the kernel, and the product
