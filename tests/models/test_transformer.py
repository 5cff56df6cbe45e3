"""The transformer: packing, padding, cuts and caches change nothing about what a token sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

WINDOWED = dataclasses.replace(tiny.CONFIG, kinds=(Kind(window=5),) * 4, tied=True, qk_norm="head", attention_bias=True)


def logits(net, params, batch):
    return np.asarray(tiny.logits(net, params, batch))


def one(tokens, length):
    row = np.zeros((1, length), np.int32)
    row[0, : len(tokens)] = tokens
    real = (np.arange(length) < len(tokens)).astype(np.int32)[None]
    return Batch(row, row, real.astype(np.float32), real, (np.arange(length) * real).astype(np.int32))


@pytest.mark.parametrize("config", [tiny.CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_a_packed_example_sees_what_it_sees_alone(config):
    net = tiny.build(config)
    params, batch = tiny.init(net), tiny.batch(rows=4)
    packed = logits(net, params, batch)
    for row in range(4):
        for segment in (1, 2):
            where = np.flatnonzero(batch.segments[row] == segment)
            alone = logits(net, params, one(batch.tokens[row, where], batch.tokens.shape[1]))[0, : len(where)]
            np.testing.assert_allclose(packed[row, where], alone, atol=2e-6)


def test_a_cut_stack_computes_the_same():
    whole, cut = tiny.build(), tiny.build(cuts=(1, 3))
    params, batch = tiny.init(whole), tiny.batch()
    leaves = {}
    for name, leaf in tree.flatten(params).items():
        if name.startswith("blocks/0-3/"):
            rest = name.removeprefix("blocks/0-3/")
            leaves |= {f"blocks/0-0/{rest}": leaf[:1], f"blocks/1-2/{rest}": leaf[1:3], f"blocks/3-3/{rest}": leaf[3:]}
        else:
            leaves[name] = leaf
    np.testing.assert_allclose(logits(cut, tree.unflatten(leaves), batch), logits(whole, params, batch), atol=1e-6)


@pytest.mark.parametrize("kinds", [(Kind(),), (Kind(window=5), Kind())], ids=["one a turn", "two a turn"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat, kinds):
    """Layers that share a turn of the loop wait for their gradients, each behind a barrier; a single one need not."""
    config = dataclasses.replace(tiny.CONFIG, kinds=kinds * (4 // len(kinds)))
    plain, other = tiny.build(config), tiny.build(dataclasses.replace(config, remat=remat))
    params, batch = tiny.init(plain), tiny.batch()
    loss = lambda net: lambda p: jnp.square(net.apply(p, batch)[0]).mean()  # noqa: E731
    lowered = [jax.jit(jax.grad(loss(net))).lower(params) for net in (plain, other)]
    assert [text.as_text().count("optimization_barrier") for text in lowered] == [0, len(kinds) if len(kinds) > 1 else 0]
    one, two = (text.compile()(params) for text in lowered)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(a).max()))), one, two)


def test_a_network_with_a_kernel_computes_the_same():
    """A local and a global layer in turn, soft-capped scores, and padding."""
    config = dataclasses.replace(tiny.CONFIG, layers=2, kinds=(Kind(window=20), Kind()), max_length=128, softcap=3.0)
    plain, splash = (tiny.build(dataclasses.replace(config, attention=form, remat="full")) for form in ("blockwise", "splash_interpreted"))
    params, batch = tiny.init(plain), tiny.batch(rows=2, length=128)
    loss = lambda net: lambda p: (jnp.square(tiny.logits(net, p, batch)).mean(-1) * batch.weights).sum()  # noqa: E731
    (one, slopes), (two, others) = (jax.jit(jax.value_and_grad(loss(net)))(params) for net in (plain, splash))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max()))), slopes, others)
    assert "splash" in str(jax.make_jaxpr(loss(splash))(params)) and "splash" not in str(jax.make_jaxpr(loss(plain))(params))


@pytest.mark.parametrize("config", [tiny.CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_cached_decoding_equals_the_full_forward(config):
    net = tiny.build(config, cuts=(2,))
    params = tiny.init(net)
    batch = one(np.arange(12) % 67, 12)
    full = logits(net, params, batch)
    cache = config.empty_cache(1, 12, (2,))
    got, extend = [], jax.jit(net.extend)
    for start, stop in ((0, 5), *((i, i + 1) for i in range(5, 12))):
        part = slice(start, stop)
        hidden, head, cache = extend(params, batch.tokens[:, part], batch.positions[:, part], batch.segments[:, part], cache)
        got.append(head(hidden))
    np.testing.assert_allclose(np.concatenate(got, 1), full, atol=2e-6)


def test_added_tokens_take_their_places_in_the_vocabulary():
    for first, tied in ((67, True), (60, False)):  # beyond the table, and on unused rows of it
        plain_config = dataclasses.replace(tiny.CONFIG, vocab_size=max(67, first + 3), tied=tied)
        config = dataclasses.replace(tiny.CONFIG, added=(first, 3), tied=tied)
        net, plain = tiny.build(config), tiny.build(plain_config)
        params = {**tiny.init(net)}
        rows = jax.random.normal(jax.random.key(1), (3, 32))
        params["embed"] = {**params["embed"], "added": rows}
        table = np.zeros((plain_config.vocab_size, 32), np.float32)
        table[:67] = params["embed"]["table"]
        table[first : first + 3] = rows
        expected = {**params, "embed": {"table": jnp.asarray(table)}}
        if not tied:
            params["head"] = {**params["head"], "added": rows * 2}
            expected["head"] = {"kernel": params["head"]["kernel"].at[:, first : first + 3].set((rows * 2).T)}
        batch = tiny.batch(vocab=first + 3)
        assert config.vocabulary == plain_config.vocab_size
        np.testing.assert_allclose(logits(net, params, batch), logits(plain, expected, batch), atol=2e-6)


def test_foreign_parameters_are_refused_by_name():
    net = tiny.build()
    params = {**tiny.init(net)}
    params["embed"] = {"tabel": params["embed"]["table"]}
    with pytest.raises(ValueError, match=r"missing: embed/table; unexpected: embed/tabel"):
        net.apply(params, tiny.batch())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"heads=4 must be a multiple of kv_heads=3"):
        dataclasses.replace(tiny.CONFIG, kv_heads=3)
    with pytest.raises(ValueError, match="layers=0"):
        TransformerConfig(vocab_size=8, width=8, layers=0, heads=1, kv_heads=1, head_dim=8, hidden=8, max_length=8)


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_every_matmul_has_the_precision_that_the_config_asks_for(precision):
    net, batch = tiny.build(dataclasses.replace(tiny.CONFIG, precision=precision)), tiny.batch()

    def loss(params):
        hidden, head, _ = net.apply(params, batch)
        return head(hidden).sum()

    with jax.default_matmul_precision("default"):
        text = jax.jit(jax.grad(loss)).lower(tiny.init(net)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    exact = [line for line in dots if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(dots) > 20 and len(exact) == (len(dots) if precision == "highest" else 0)


@pytest.mark.parametrize(("sizes", "dealt"), [({"data": 2, "fsdp": 4}, True), ({"fsdp": 4, "expert": 2}, False)], ids=str)
def test_embedded_tokens_are_looked_up_by_columns_and_dealt_out(sizes, dealt):
    net = tiny.build()
    with jax.set_mesh(meshes.over(jax.devices(), **sizes)):
        text = str(jax.make_jaxpr(lambda params, batch: net.apply(params, batch)[0])(net.abstract, tiny.batch()))
    assert ("spec=P('data', None, 'fsdp')" in text) == dealt
