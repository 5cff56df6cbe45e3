"""Every form of attention is the plain formula: values and gradients, whatever the mask, on one device or a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuning.core import mesh as meshes
from tuning.nn import blockwise, kernels
from tuning.nn.blockwise import EVERYWHERE, How, Marks

HOWS = {
    "causal": How(0.3, causal=True),
    "both ways": How(0.3),
    "window": How(0.3, causal=True, window=40),
    "window both ways": How(0.3, window=40),
    "softcap": How(0.3, softcap=2.0, causal=True),
}


def plain(how, q, k, v, queries, keys, bias=None):
    """In float64, with everything written out."""
    q, k, v = (x.astype(jnp.float64) for x in (q, k, v))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k).reshape(B, N, T, S) * how.scale
    scores = how.softcap * jnp.tanh(scores / how.softcap) if how.softcap else scores
    scores = scores if bias is None else scores + bias.reshape(-1, *bias.shape[-3:])
    mask = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        own, other = queries.segments[b, t], keys.segments[b, s]
        away = queries.positions[b, t] - keys.positions[b, s]
        mask[b, t, s] = (own == other != 0 or other == EVERYWHERE) and (away >= 0 or not how.causal) and abs(away) < (how.window or S * T)
    shares = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)) * mask.any(-1)[:, None, :, None]
    return jnp.einsum("bkgts,bskh->btkgh", shares.reshape(B, K, N // K, T, S), v).reshape(B, T, N, H)


def rows(B, T, seed=0):
    """Packed rows: two segments, and padding."""
    first, last = np.random.default_rng(seed).integers([T // 5, T - T // 5], [T // 2, T], (B, 2)).T[..., None]
    at = np.arange(T, dtype=np.int32)[None]
    return Marks((np.where(at < first, 1, 2) * (at < last)).astype(np.int32), (np.where(at < first, at, at - first) * (at < last)))


def draw(T, S, B=2, N=4, K=2, H=16):
    normal = np.random.default_rng(3).normal
    return [jnp.asarray(normal(size=(B, *size, H)), jnp.float32) for size in ((T, N), (S, K), (S, K), (T, N))]


def same(ours, how, queries, keys, arrays, bias=None):
    """Values and all gradients, to 1e-5."""
    *qkv, dy = arrays
    given = (*qkv, bias) if bias is not None else tuple(qkv)

    def both(function):
        y, back = jax.vjp(function, *given)
        return y, *back(dy.astype(y.dtype))

    got = jax.jit(lambda: both(ours))()
    with jax.enable_x64(True):
        wanted = both(lambda q, k, v, bias=None: plain(how, q, k, v, queries, keys, bias))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def blocks(how, queries, keys):
    return lambda *arrays: blockwise.attend(how, *arrays[:3], *jax.tree.map(jnp.asarray, (queries, keys)), *arrays[3:])


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("scores", [512 * 512, 90 * 20], ids=["one block", "blocks"])
def test_blocks_are_the_plain_formula(how, scores, monkeypatch):
    monkeypatch.setattr(blockwise, "SCORES", scores)
    marks = rows(2, 90)
    same(blocks(how, marks, marks), how, marks, marks, draw(90, 90))


@pytest.mark.parametrize("shape", [(4, 50, 70), (2, 4, 1, 70)])
def test_blocks_add_a_bias_and_see_what_is_seen_everywhere(shape, monkeypatch):
    monkeypatch.setattr(blockwise, "SCORES", 70 * 16)  # the last block is filled up
    queries, keys = rows(2, 50), rows(2, 70, seed=1)
    keys.segments[:, :3] = EVERYWHERE
    bias = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    same(blocks(HOWS["window"], queries, keys), HOWS["window"], queries, keys, draw(50, 70), bias)


def test_dropout_is_the_same_in_both_passes_and_other_in_each_block(monkeypatch):
    monkeypatch.setattr(blockwise, "SCORES", 64 * 32)
    how, marks = How(0.3, dropout=0.4), jax.tree.map(jnp.asarray, rows(2, 64))
    q, k, v, dy = draw(64, 64)
    ones = jnp.ones_like(v)
    loss = lambda v, k=k: (blockwise.attend(how, q, k, v, marks, marks, None, jax.random.key(0)) * dy).sum()  # noqa: E731
    step = 1e-2 * jnp.sign(jax.grad(loss)(v))
    np.testing.assert_allclose(loss(v + step) - loss(v), (jax.grad(loss)(v) * step).sum(), rtol=1e-3)  # linear in v, with its own gradient
    bump = 1e-3 * jnp.sign(jax.grad(loss, argnums=1)(v, k))
    slope = (jax.grad(loss, argnums=1)(v, k) * bump).sum()
    np.testing.assert_allclose((loss(v, k + bump) - loss(v, k - bump)) / 2, slope, rtol=1e-2)
    same_query = jnp.broadcast_to(q[:, :1], q.shape)
    kept = blockwise.attend(how, same_query, jnp.zeros_like(k), ones, marks, marks, None, jax.random.key(0))[..., 0]
    real = np.asarray(marks.segments != 0)[..., None]
    assert abs(float((kept * real).sum() / (real.sum() * 4)) - 1) < 0.05
    assert np.abs(kept[:, :32] - kept[:, 32:]).max() > 0.1


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_splash_is_the_plain_formula(how):
    marks, settings = rows(2, 256), kernels.Settings("splash_interpreted", how)
    splash = lambda q, k, v: kernels.attend(settings, q, k, v, jax.tree.map(jnp.asarray, marks))  # noqa: E731
    same(splash, how, marks, marks, draw(256, 256))


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 4}], ids=str)
def test_splash_on_a_mesh_is_the_plain_formula(sizes):
    """Rows and heads that are split; fewer key-value heads than parts; rows that do not divide."""
    how, marks = HOWS["causal"], rows(2, 128)
    settings = kernels.Settings("splash_interpreted", how)
    where = meshes.over(jax.devices()[: np.prod(list(sizes.values()))], **sizes)
    with jax.set_mesh(where):
        got = jax.jit(lambda *qkv: kernels.attend(settings, *qkv, jax.tree.map(jnp.asarray, marks)))
        same(lambda q, k, v: got(q, k, v), how, marks, marks, draw(128, 128))


def program(T, layers=2, B=1, N=4, K=2, H=16):
    """The passes of some layers, in a loop."""
    how = How(0.3, causal=True)

    def loss(q, k, v, segments, positions):
        marks = Marks(segments, positions)
        return jax.lax.scan(lambda y, _: (blockwise.attend(how, y, k, v, marks, marks), None), q, length=layers)[0].sum()

    heads = [jax.ShapeDtypeStruct((B, T, n, H), jnp.float32) for n in (N, K, K)]
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*heads, *[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 2).compile()


def test_no_array_of_all_scores_exists_for_long_sequences():
    """Nor of the mask, outside of the loop neither."""
    text = program(1024).as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"(?:f32|pred|s32)\[([\d,]+)\]", text)]
    assert max(sizes) == 4 * blockwise.QUERIES * 1024  # the scores of one block, for each head
    assert not re.search(r"\b1024,(?:\d+,)?1024\b", text)
    short, long = (program(T).memory_analysis().temp_size_in_bytes for T in (1024, 4096))
    assert long < 4.2 * short  # linear in T


def test_a_short_sequence_is_one_block_without_a_loop():
    assert " while(" not in program(128, layers=1).as_text() and " while(" in program(256, layers=1).as_text()


@functools.cache
def needs(**changes):
    return kernels.Needs(**{**dict(dtype="bfloat16", head_dim=128, softcap=0.0, dropout=0.0, bias=False, prefix=0), **changes})


def test_the_device_chooses_and_what_its_kernel_cannot_do_says_why():
    assert kernels.choose("auto", "tpu", needs(softcap=50.0, head_dim=256)) == ("splash", "")
    assert kernels.choose("cudnn", "gpu", needs(length=4098)) == ("cudnn", "")
    assert kernels.choose("auto", "cpu", needs()) == ("blockwise", "")
    assert kernels.choose("blockwise", "tpu", needs()) == ("blockwise", "")
    for form, platform, changes, why in [
        ("auto", "tpu", dict(length=1000), "splash: length=1000 is no multiple of 128"),
        ("auto", "tpu", dict(bias=True), "splash: positions enter as a bias"),
        ("auto", "tpu", dict(dropout=0.1), "splash: attention_dropout=0.1"),
        ("auto", "tpu", dict(prefix=10), "splash: 10 keys stand before"),
        ("auto", "gpu", {}, "cudnn: not run on a GPU by us yet"),
        ("cudnn", "gpu", dict(dtype="float32"), "cudnn: dtype=float32"),
        ("cudnn", "gpu", dict(head_dim=256), "cudnn: head_dim=256"),
        ("cudnn", "gpu", dict(softcap=50.0), "cudnn: softcap=50.0"),
        ("splash", "cpu", {}, "splash: not for cpu"),
        ("cudnn", "tpu", {}, "cudnn: not for tpu"),
    ]:
        found, reason = kernels.choose(form, platform, needs(**changes))
        assert found == "blockwise" and why in reason
    with pytest.raises(ValueError, match=r"model\.attention='flash' is not one of auto, blockwise, splash"):
        kernels.choose("flash", "tpu", needs())


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_cudnn_lowers_for_cuda_forward_and_backward(sizes, monkeypatch):
    """What can be held of it without a GPU; which version of cuDNN there is cannot be asked."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    settings, marks = kernels.Settings("cudnn", HOWS["window"]), jax.tree.map(jnp.asarray, rows(2, 64))
    q, k, v, dy = (x.astype(jnp.bfloat16) for x in draw(64, 64))

    def loss(q, k, v):
        return (kernels.attend(settings, q, k, v, marks) * dy).sum()

    where = meshes.over(jax.devices()[: np.prod([1, *sizes.values()])], **sizes)
    with jax.set_mesh(where):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    local = [2 // sizes.get("data", 1), 4 // sizes.get("tensor", 1)]
    assert [len(re.findall(rf"__cudnn\$fmhaScaleBiasSoftmax{way}\b", text)) for way in ("", "Backward")] == [1, 1]
    assert f"tensor<{local[0]}x64x{local[1]}x16xbf16>" in text and f"tensor<{local[0]}x1x64x64xbf16>" in text
