"""Biases on attention's scores, against transformers, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuning.nn import position
from tuning.nn.blockwise import How, Marks, attend


@pytest.mark.parametrize("heads", [1, 12, 32, 71, 128])
def test_the_bias_of_keys_is_rounded_as_falcon_rounds_it(heads):
    torch = pytest.importorskip("torch")
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    mask = torch.ones(2, 2100, dtype=torch.long)
    theirs = build_alibi_tensor(mask, heads, torch.float32).reshape(2, heads, 1, -1).numpy()
    positions = jnp.broadcast_to(jnp.arange(2100), (2, 2100))
    ours = jax.jit(position.alibi_of_keys, static_argnums=0)(heads, positions)
    assert np.array_equal(ours, theirs)
    plain = position.slopes(heads).reshape(-1, 1, 1) * np.arange(2100, dtype=np.float32)
    assert not np.array_equal(plain, theirs[0])


@pytest.mark.parametrize("shape", [(4, 5, 7), (2, 4, 1, 7)])
def test_a_bias_and_its_gradient_are_those_of_the_plain_formula(shape):
    draw = np.random.default_rng(0).normal
    q, k, v, dy = (draw(size=(2, length, heads, 8)).astype(np.float32) for length, heads in ((5, 4), (7, 2), (7, 2), (5, 4)))
    bias = jnp.asarray(draw(size=shape), jnp.float32)
    queries, keys = (np.random.default_rng(1).integers(1, 3, (2, length), np.int32) for length in (5, 7))
    mask = (queries[:, :, None] == keys[:, None, :])[:, None]

    def plain(bias):
        scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, 5, 2, 2, 8), k).reshape(2, 4, 5, 7) / 3
        shares = jax.nn.softmax(jnp.where(mask, scores + bias.reshape(-1, *shape[-3:]), -1e30)).reshape(2, 2, 2, 5, 7)
        return jnp.einsum("bkgts,bskh->btkgh", shares, v).reshape(2, 5, 4, 8)

    marks = [Marks(jnp.asarray(segments), jnp.zeros_like(segments)) for segments in (queries, keys)]
    ours = lambda bias: attend(How(1 / 3), *map(jnp.asarray, (q, k, v)), *marks, bias)  # noqa: E731
    assert np.abs(ours(bias) - plain(bias)).max() < 1e-5
    gradients = [jax.grad(lambda bias, f=f: (f(bias) * dy).sum())(bias) for f in (ours, plain)]
    assert gradients[0].shape == shape and np.abs(gradients[0] - gradients[1]).max() < 1e-5 * np.abs(gradients[1]).max()


# (buckets, longest): T5's own; two with distances right where two buckets meet; few buckets; more than distances
@pytest.mark.parametrize("buckets, longest", [(32, 128), (17, 27), (48, 81), (4, 3), (8, 20), (64, 1000), (128, 70)])
@pytest.mark.parametrize("causal", [True, False])
def test_every_distance_has_the_bucket_that_t5_gives_it(buckets, longest, causal):
    torch = pytest.importorskip("torch")
    from flax import nnx
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-3 * longest, 3 * longest + 1)
    theirs = T5Attention._relative_position_bucket(torch.tensor(-distances), not causal, buckets, longest).numpy()
    with nnx.use_eager_sharding(False):
        bias = position.RelativeBias(buckets, longest, 2, causal, nnx.Rngs(0))
    # Where the formula gives a whole number, the last bit of torch's logarithm decides, and that differs by processor. Not so for T5's own.
    count = buckets if causal else buckets // 2
    single = count // 2
    far = np.log(np.maximum(np.abs(distances), 1) / single) / np.log(longest / single) * (count - single)
    meet = (np.abs(far - far.round()) < 1e-5) & (far > 0) & (far < count - single) & ((buckets, longest) != (32, 128))
    ours = np.asarray(bias.bucket(jnp.asarray(distances)))
    assert np.array_equal(ours[~meet], theirs[~meet]) and np.abs(ours - theirs).max() <= 1 and meet.sum() <= 4
    assert theirs.max() == (buckets if causal else buckets // 2 * 2) - 1  # the last bucket is reached
    assert np.array_equal(bias(jnp.asarray(distances)[:, None])[:, :, 0], bias.table[...][ours].T)


@pytest.mark.parametrize("buckets, longest", [(2, 20), (32, 8)])
def test_a_relative_bias_without_room_for_its_buckets_is_refused(buckets, longest):
    from flax import nnx

    with pytest.raises(ValueError, match=f"{buckets} buckets .* longest={longest} lie beyond"):
        position.RelativeBias(buckets, longest, 2, False, nnx.Rngs(0))
