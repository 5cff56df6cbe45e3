"""The encoder-decoder: who sees whom, dropout in its places, what the two sides share, and what it costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import hlo, tiny
from tuning.core import tree
from tuning.core.types import Inputs
from tuning.methods.partial import partial
from tuning.models.encoder_decoder import EncoderDecoderConfig
from tuning.models.heads import HeadConfig
from tuning.models.transformer import TransformerConfig

SIDE = dict(vocab_size=67, width=32, heads=4, kv_heads=2, head_dim=12, hidden=48, max_length=64, positions="relative", relative=(8, 20))
CONFIG = EncoderDecoderConfig(TransformerConfig(layers=2, causal=False, **SIDE), TransformerConfig(layers=3, tied=True, **SIDE), start=0)
B, T, S = 2, 12, 20


def batch(seed=0):
    """Two packed examples per row and padding behind them, on both sides."""
    decoder, encoder = tiny.batch(B, T, seed=seed), tiny.batch(B, S, seed=seed + 1)
    return dataclasses.replace(decoder, inputs=Inputs(encoder.tokens, encoder.segments, encoder.positions))


@functools.cache
def params():
    """Tables large enough for tokens and distances to count."""
    return tree.map_named(lambda name, x: 20 * x if name.endswith("table") else x, tiny.init(tiny.build(CONFIG)))


def logits(batch, key=None, config=CONFIG):
    return np.asarray(tiny.logits(tiny.build(config), params(), batch, key))


def other_tokens(batch, where, side="decoder"):
    """The batch with other tokens where the mask says."""
    change = lambda x: dataclasses.replace(x, tokens=np.where(where, (x.tokens + 1) % 67, x.tokens))  # noqa: E731
    return change(batch) if side == "decoder" else dataclasses.replace(batch, inputs=change(batch.inputs))


def changed(where, side):
    """[B, T], where the logits change with the tokens there."""
    return (logits(other_tokens(batch(), where, side)) != logits(batch())).any(-1)


def test_a_decoder_sees_all_inputs_of_its_own_segment_and_no_others():
    segments, read = batch().segments, batch().inputs.segments
    for segment in (1, 2):
        for one in (np.cumsum(read == segment, 1) == 1, read == segment):  # the segment's first token, or all of it
            assert np.array_equal(changed(one & (read == segment), "encoder"), segments == segment)


def test_a_decoders_token_is_seen_from_there_on_in_its_segment():
    segments = batch().segments
    place = (segments == 1).sum(1, keepdims=True) // 2  # in the middle of the first segment
    at = np.arange(T)[None]
    assert np.array_equal(changed(at == place, "decoder"), (segments == 1) & (at >= place))


def test_what_stands_in_the_padding_changes_nothing():
    for side, segments in (("decoder", batch().segments), ("encoder", batch().inputs.segments)):
        assert not changed(segments == 0, side)[batch().segments > 0].any()


def test_dropout_acts_where_t5_has_it(monkeypatch):
    """After both embeddings and both ends, on what each sublayer adds, on all attention shares and inside feed-forward layers."""
    shapes = []
    bernoulli = jax.random.bernoulli
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: (shapes.append(shape), bernoulli(key, p, shape))[1])
    places = {
        "dropout": [(B, S, 32)] * 4 + [(B, T, 32)] * 5,
        "attention_dropout": [(B, 2, 2 * S, S), (B, 2, 2 * T, T), (B, 2, 2 * T, S)],
        "mlp_dropout": [(B, S, 48), (B, T, 48)],
    }
    for name, expected in places.items():
        config = CONFIG.replace(**{name: 0.5})
        assert getattr(config.encoder, name) == getattr(config.decoder, name) == 0.5
        for key, wanted in ((jax.random.key(0), expected), (None, [])):
            shapes.clear()
            jax.eval_shape(tiny.build(config).apply, params(), batch(), key)  # traces each side's layer once
            assert sorted(shapes) == sorted(wanted), name


def test_a_key_repeats_its_dropout_and_another_does_not():
    config = CONFIG.replace(dropout=0.2, attention_dropout=0.2, mlp_dropout=0.2)
    one, again, other = (logits(batch(), jax.random.key(seed), config) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and np.abs(one - other).max() > 0.1
    assert np.array_equal(logits(batch(), None, config), logits(batch()))


def test_rematerialisation_changes_no_gradient():
    def gradients(config):
        return jax.jit(jax.grad(lambda p: jnp.square(tiny.build(config).apply(p, batch())[0]).mean()))(params())

    plain, other = (tree.flatten(gradients(c)) for c in (CONFIG, CONFIG.replace(remat="full")))
    for name, gradient in plain.items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(gradient, other[name], atol=1e-6 * max(1.0, float(np.abs(gradient).max())), err_msg=name)


def test_it_computes_in_the_dtype_that_it_is_asked_for():
    config = CONFIG.replace(dtype="bfloat16")
    hidden, *_ = jax.eval_shape(tiny.build(config).apply, params(), batch())
    assert hidden.dtype == jnp.bfloat16 and config.encoder.dtype == "bfloat16"
    assert config.empty_cache(1, 4).layers["0-2"][0].dtype == jnp.bfloat16


def test_the_last_layers_of_partial_tuning_are_the_decoders():
    outline = tiny.outline(CONFIG)
    assert outline.layers == 3
    roles = {site.role for site in outline.sites}
    assert {"encoder/attn/q", "encoder/mlp/up", "decoder/attn/o", "decoder/cross/k", "decoder/mlp/down"} < roles
    method = partial(outline, last_layers=1)
    leaves = tree.flatten(tiny.build(CONFIG, cuts=method.cuts).abstract)
    assert {name.rsplit("/", 3)[0] for name in leaves if method.tuned(name)} == {"decoder/blocks/2-2", "decoder/blocks"}
    assert all("/2-2/" in name for name in leaves if method.tuned(name))


def test_attention_costs_what_is_counted():
    net = tiny.build(CONFIG)
    text = jax.jit(lambda p, b: net.apply(p, b)[0]).lower(params(), batch()).compile().as_text()
    size = lambda name, leaf: leaf.size * (S if name.startswith("encoder/") or "/cross/k/" in name or "/cross/v/" in name else T)  # noqa: E731
    weights = 2 * sum(size(name, leaf) for name, leaf in tree.flatten(params()).items() if name.endswith("kernel"))
    seen = CONFIG.attention_flops(T, S) + CONFIG.decoder.attention_flops(T)  # causal attention computes both halves and counts one
    assert hlo.dot_flops(text) == B * (weights + T * seen)
    assert CONFIG.attention_flops(T) == CONFIG.attention_flops(T, T)


def test_what_the_two_sides_share_changes_in_both_and_the_rest_in_the_decoder():
    config = CONFIG.replace(vocab_size=70, dropout=0.3, precision="default", head=HeadConfig(scale=0.5), added=(70, 2))
    for side in (config.encoder, config.decoder):
        assert (side.vocab_size, side.dropout, side.precision) == (70, 0.3, "default")
    assert config.head.scale == 0.5 and config.encoder.head == HeadConfig()
    assert config.vocabulary == 72 and config.start == 0


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"encoder": {"width": 64}}, "differ in width"),
        ({"encoder": {"causal": True}}, "sees both ways"),
        ({"decoder": {"causal": False}}, "sees both ways"),
        ({"decoder": {"order": "after"}}, "order='after'.*'before'"),
        ({"encoder": {"positions": "learned"}}, "positions='learned'.*'relative'"),
        ({"decoder": {"qk_norm": "head"}}, "qk_norm='head'"),
        ({"encoder": {"embed_scale": 2.0}}, "embed_scale=2.0"),
        ({"decoder": {"head": HeadConfig(output="classes", classes=("a", "b"), pool="mean")}}, "pool='mean'"),
    ],
)
def test_sides_that_do_not_go_together_are_refused(sides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{name: dataclasses.replace(getattr(CONFIG, name), **changes) for name, changes in sides.items()})
