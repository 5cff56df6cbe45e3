"""What stands beside the weights: prompts before the tokens, prefixes before the keys, adapters after the sublayers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tuning
from tests import runs, tiny
from tuning.api import evaluate
from tuning.core import tree
from tuning.core.types import Batch
from tuning.decode.generate import generate
from tuning.methods import METHODS
from tuning.methods.bottleneck import Adapter
from tuning.models import network
from tuning.nn.sites import Site
from tuning.training import writer


def made(name, config=tiny.CONFIG, **settings):
    """(method, network, parameters that are all moved)"""
    method = METHODS[name](tiny.outline(config), **settings)
    net = network.build(config.construct(method.sites, method.cuts))
    params = tiny.init(net)
    return method, net, tree.map_named(lambda n, x: x + 0.1 * jax.random.normal(jax.random.key(len(n)), x.shape), params)


@pytest.mark.parametrize(
    ("name", "settings"), [("prompt", {"length": 3}), ("p_tuning", {"length": 3, "hidden": 8}), ("prefix", {"length": 3})]
)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_examples_are_as_they_are_apart(name, settings, causal):
    config = tiny.CONFIG if causal else dataclasses.replace(tiny.CONFIG, causal=False, positions="learned")
    method, net, params = made(name, config, **settings)
    tokens = np.random.default_rng(0).integers(0, 67, (2, method.slots + 7)).astype(np.int32)
    apart = batch_of(tokens, [np.arange(len(row)) for row in tokens], np.ones_like(tokens))
    both = tokens.reshape(1, -1)
    packed = batch_of(both, [np.concatenate([np.arange(tokens.shape[1])] * 2)], np.repeat([[1, 2]], tokens.shape[1], axis=1))
    close(tiny.logits(net, params, packed).reshape(2, tokens.shape[1], -1), tiny.logits(net, params, apart))


def batch_of(tokens, positions, segments):
    return Batch(tokens, tokens, np.ones(tokens.shape, np.float32), np.asarray(segments, np.int32), np.asarray(positions, np.int32))


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize(
    ("name", "settings"), [("prompt", {"length": 3}), ("prefix", {"length": 3}), ("bottleneck", {"width": 8}), ("ia3", {})]
)
def test_generation_with_a_cache_says_what_the_full_pass_says(name, settings):
    method, net, params = made(name, **settings)
    prompt = [*([0] * method.slots), 5, 9, 2]
    cache = lambda batch, slots: tiny.CONFIG.empty_cache(batch, slots, method.cuts)  # noqa: E731
    (new,) = generate(net.extend, cache, params, [prompt], max_new_tokens=6)
    whole = np.array([prompt + new], np.int32)
    said = np.asarray(tiny.logits(net, params, batch_of(whole, [np.arange(whole.shape[1])], np.ones_like(whole)))).argmax(-1)[0]
    assert said[len(prompt) - 1 : -1].tolist() == new


def test_a_prompt_starts_from_rows_of_the_embedding():
    outline = dataclasses.replace(tiny.outline(), encode=lambda text: [int(word) for word in text.split()])
    for settings, want in (({"init": "text", "text": "7 8"}, [7, 8, 7, 8, 7]), ({}, np.random.default_rng(0).integers(0, 67, 5).tolist())):
        method = METHODS["prompt"](outline, length=5, **settings)
        params = tiny.init(network.build(tiny.CONFIG.construct(method.sites)))
        np.testing.assert_array_equal(method.start(params)["embed"]["adapter"]["prompt"], params["embed"]["table"][np.array(want)])


def test_the_prompt_that_p_tuning_says_is_a_prompt():
    method, net, params = made("p_tuning", length=4, hidden=8)
    plain = METHODS["prompt"](tiny.outline(), length=4)
    bare = method.bare(params)
    batch = tiny.batch()
    close(tiny.logits(tiny.build(sites=plain.sites), bare, batch), tiny.logits(net, params, batch))
    assert not any("kernel_" in name for name in tree.flatten(bare))


@pytest.mark.parametrize("place", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("post", [True, False])
def test_a_bottleneck_stands_where_it_was_published(place, post):
    """With R in the residual stream, h from the sublayer and LN where the sum is normalised: h + D(h), h + D(LN(h + R)), h + D(R)."""
    with nnx.use_eager_sharding(False):
        adapter = Adapter(Site("mlp", (6, 6), ("embed", "norm")), 4, place, "relu", 2.0, nnx.Rngs(0))
    adapter.up[...] = jax.random.normal(jax.random.key(1), (4, 6))
    adapter.down_bias[...], adapter.up_bias[...] = jnp.arange(4.0), jnp.arange(6.0)
    residual, said = jax.random.normal(jax.random.key(2), (2, 1, 3, 6))
    norm = (lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)) if post else None
    reads = {"houlsby": said, "parallel": residual, "pfeiffer": norm(said + residual) if norm else said + residual}[place]
    down, up = np.asarray(adapter.down[...]), np.asarray(adapter.up[...])
    want = said + 2.0 * (np.maximum(np.asarray(reads) @ down + np.arange(4.0).reshape(1, 1, 4), 0) @ up + np.arange(6.0).reshape(1, 1, 6))
    close(adapter(residual, said, norm, None), want)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("prompt", {"length": 0}, "at least one"), ("prompt", {"init": "tekst"}, "not one of"), ("prompt", {"text": "a"}, "goes with"),
        ("prefix", {"length": 0}, "at least one"), ("bottleneck", {"place": "above"}, "houlsby"),
        ("tokens", {"ids": ()}, "at least one"), ("tokens", {"ids": (3, 3)}, "each once"), ("tokens", {"ids": (67,)}, "from 0 to 66"),
        ("bottleneck", {"width": 0}, "at least 1"), ("ia3", {"targets": ("w",)}, "matches no site"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](tiny.outline(), **settings)


def test_a_bias_by_distance_leaves_no_place_for_a_prefix():
    with pytest.raises(ValueError, match="rotary or learned"):
        METHODS["prefix"](tiny.outline(dataclasses.replace(tiny.CONFIG, positions="alibi")))


@pytest.mark.parametrize("name", ["prompt", "prefix", "bottleneck", "ia3"])
def test_a_run_learns_and_is_loaded_as_it_was(home, tmp_path, name):
    settings = {"prompt": {"length": 4}, "prefix": {"length": 4}, "bottleneck": {"width": 8}, "ia3": {}}[name]
    config = runs.config(home, train={"steps": 12, "batch_size": 16, "log_every": 1}, eval={"every": 12})
    config["method"] = {"name": name, **settings}
    config["optimizer"]["learning_rate"] = 5e-2
    final = tuning.train(config, tmp_path / "run")
    model = tuning.load(tmp_path / "run")
    text = "the a the a the"
    begun = next(line["eval/loss"] for line in writer.read(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in line)
    assert final["eval/loss"] < begun - 0.02
    assert evaluate(model, config)["loss"] == pytest.approx(final["eval/loss"], rel=1e-5)
    ids = np.array([model.tokenizer(text)["input_ids"]])
    logits = np.asarray(model.logits(ids))
    assert logits.shape[:2] == ids.shape
    told = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], ids[:, 1:, None], axis=2).mean()
    assert told == pytest.approx(model.score([text])[0], rel=1e-5)
    assert len(model.generate(text, max_new_tokens=3)) == 1
    if name != "ia3":
        with pytest.raises(ValueError, match="cannot be folded"):
            model.export(tmp_path / "hf", merge=True)
