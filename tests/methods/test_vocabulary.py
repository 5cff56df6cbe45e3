"""LoRA on the embedding and on the output: which weights get a gradient, what folding gives, on one device and split over several."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tuning
from tests import runs, tiny
from tuning import api, build, weights
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.methods import METHODS
from tuning.models.heads import HeadConfig
from tuning.objectives.tokens import next_token, token_losses

# 68 tokens, so that 4 devices can share them.
UNTIED = dataclasses.replace(tiny.CONFIG, vocab_size=68, embed_scale=3.0, layers=1, kinds=())
TIED = dataclasses.replace(UNTIED, tied=True, head=HeadConfig(scale=0.5, softcap=20.0, bias=True))
CASES = {
    "embed": (UNTIED, dict(targets=("embed",))),
    "head": (UNTIED, dict(targets=("head",))),
    "both and a layer's": (UNTIED, dict(targets=("embed", "head", "q"), ranks=("embed=2", "head=3"), alphas=("head=5",))),
    "head dora": (UNTIED, dict(targets=("head",), dora=True)),
    "head pissa": (UNTIED, dict(targets=("head", "down"), init="pissa")),
    "head olora dora": (UNTIED, dict(targets=("head",), init="olora", dora=True)),
    "tied": (TIED, dict(targets=("embed", "down"))),
}


def made(config, settings):
    """(method, network, parameters at the start, the same with all that learns moved)"""
    method = METHODS["lora"](tiny.outline(config), rank=4, alpha=6.0, **settings)
    net = tiny.build(config, method.sites)
    start = method.start(tiny.init(net))
    learns = lambda n: method.tuned(n) and method.pace(n).rate > 0  # noqa: E731
    return method, net, start, tree.map_named(lambda n, x: x + 0.1 * noise(n, x) if learns(n) else x, start)


def noise(name, x):
    return jax.random.normal(jax.random.key(len(name)), x.shape)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_the_base_and_folding_keeps_the_logits(case):
    config, settings = CASES[case]
    method, net, start, moved = made(config, settings)
    plain, batch = tiny.build(config), tiny.batch()
    base = tree.split(start, lambda name: "/adapter/" not in name)[0]
    first = tiny.logits(plain, base, batch)
    close(tiny.logits(net, start, batch), first)
    told = tiny.logits(net, moved, batch)
    assert np.abs(told - first).max() > 0.05
    folded = jax.jit(method.fold)(moved)
    close(tiny.logits(plain, folded, batch), told)
    changed = {n for n, x in tree.flatten(folded).items() if not np.array_equal(x, tree.flatten(base)[n])}
    assert changed == {n for n in tree.flatten(base) if any(role in n for role in kernels_of(settings["targets"]))}


def kernels_of(targets):
    return ["embed/table" if target == "embed" else f"{target}/kernel" for target in targets]


def total(net, loss, params, batch):
    return loss(functools.partial(net.apply, params), batch)["loss"].total


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_chunks_are_those_of_all_logits_at_once(case):
    config, settings = CASES[case]
    method, net, _, params = made(config, settings)
    batch = tiny.batch(rows=2)
    learns, rests = tree.split(params, method.tuned)

    def whole(learns):
        hidden, head, _ = net.apply(tree.merge(learns, rests), batch)
        return (token_losses(head, hidden, batch.targets, 0.0, 0.0)["loss"] * batch.weights).sum()

    ours = jax.jit(jax.grad(lambda learns: total(net, next_token(chunk=3), tree.merge(learns, rests), batch)))(learns)
    want = tree.flatten(jax.jit(jax.grad(whole))(learns))
    for name, gradient in tree.flatten(ours).items():
        close(gradient, want[name])
        assert (np.abs(gradient).max() > 0) == (method.pace(name).rate > 0), name


def compiled(config, settings, learns=None):
    """The gradient's program, with respect to what the method says learns."""
    method, net, _, params = made(config, settings)
    own, rests = tree.split(params, learns or method.tuned)
    run = jax.grad(lambda own, rests, batch: total(net, next_token(), tree.merge(own, rests), batch))
    return jax.jit(run).lower(own, rests, tiny.batch(rows=2)).compile().as_text()


def accumulated(text, D=32, V=68):
    """Arrays of the kernel's size that a loop carries on, or a product gives."""
    shape = rf"f32\[(?:{D},{V}|{V},{D})\]"
    return len(re.findall(rf"{shape}\S* (?:add|dot)\(", text))


@pytest.mark.parametrize("case", ["head", "tied"])
def test_a_frozen_kernel_gets_no_gradient_and_no_room_for_one(case):
    config, settings = CASES[case]
    assert accumulated(compiled(config, settings)) == 0
    assert accumulated(compiled(config, settings, lambda name: name in ("head/kernel", "embed/table"))) > 0


def test_trainable_tokens_of_a_tied_model_give_its_embedding_no_gradient():
    method = METHODS["tokens"](tiny.outline(TIED), ids=(3, 9))
    net = tiny.build(TIED, method.sites)
    params = tree.map_named(lambda n, x: x + 0.1 * noise(n, x), tiny.init(net))
    own, rests = tree.split(params, method.tuned)
    run = jax.jit(jax.grad(lambda own, batch: total(net, next_token(), tree.merge(own, rests), batch)))
    assert accumulated(run.lower(own, tiny.batch(rows=2)).compile().as_text()) == 0
    plain, batch, folded = tiny.build(TIED), tiny.batch(rows=2), jax.jit(method.fold)(params)
    close(tiny.logits(plain, folded, batch), tiny.logits(net, params, batch))
    whole = jax.jit(jax.grad(lambda params: total(plain, next_token(), params, batch)))(folded)
    close(run(own, batch)["embed"]["adapter"]["rows"], whole["embed"]["table"][jnp.array([3, 9])])


@pytest.mark.parametrize("case", ["both and a layer's", "head dora", "tied"])
def test_a_vocabulary_that_is_split_over_devices_gives_the_same(case):
    config, settings = CASES[case]
    _, net, _, params = made(config, settings)
    batch = tiny.batch()
    run = lambda params, batch: jax.value_and_grad(functools.partial(total, net, next_token()))(params, batch)  # noqa: E731
    want = jax.jit(run)(params, batch)
    where = meshes.over(jax.devices(), fsdp=2, tensor=4)
    places = meshes.shardings(net.abstract, net.axes, where)
    split = tree.flatten(jax.tree.map(lambda place: place.spec, places))
    if "head" in settings["targets"]:
        assert split["head/adapter/b"] == jax.P(None, "tensor") and split["head/adapter/a"] == jax.P("fsdp", None)
    if "embed" in settings["targets"]:
        assert split["embed/adapter/a"] == jax.P("tensor", None) and split["embed/adapter/b"] == jax.P(None, "fsdp")
    with jax.set_mesh(where):
        got = jax.jit(run)(jax.device_put(params, places), jax.device_put(batch, meshes.rows(where)))
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    theirs = tree.flatten(want[1])
    for name, gradient in tree.flatten(got[1]).items():
        close(np.asarray(gradient), theirs[name])


def test_neither_all_nor_a_pattern_chooses_what_lies_outside_the_layers():
    def adapted(*targets):
        sites = METHODS["lora"](tiny.outline(UNTIED), targets=targets).sites
        return {n.split("/")[0] for n in tree.flatten(tiny.build(UNTIED, sites).abstract) if "/adapter/" in n}

    assert adapted("all") == adapted(".*") == {"blocks"}
    assert adapted("embed") == {"embed"} and adapted("q", "head") == {"blocks", "head"}


def test_other_methods_have_nothing_for_the_output():
    for name in ("ia3", "loha", "vera"):
        with pytest.raises(ValueError, match="'head' matches no site"):
            METHODS[name](tiny.outline(UNTIED), targets=("head",))


def test_dropout_falls_on_what_a_heads_adapter_reads():
    _, net, _, params = made(UNTIED, dict(targets=("head",), dropout=0.5))
    batch = tiny.batch()
    plain, one, again, other = (tiny.logits(net, params, batch, key and jax.random.key(key)) for key in (None, 1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert min(np.abs(one - other).max(), np.abs(one - plain).max()) > 1e-3


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (TIED, dict(targets=("head",)), "tied to the embedding, name 'embed', which changes both"),
        (UNTIED, dict(targets=("embed",), dora=True), "'embed' with method.dora=True"),
        (UNTIED, dict(targets=("all", "embed"), init="pissa"), "method.init='pissa'"),
        (dataclasses.replace(UNTIED, added=(60, 2)), dict(targets=("embed",)), "model.added_tokens"),
        (UNTIED, dict(targets=("q",), ranks=("head=2",)), "'head' names none of the sites"),
        (UNTIED, dict(targets=("head",), init="pissa", rank=33), r"kernel \(32, 68\) \(head\) has no 33 directions"),
    ],
)
def test_what_cannot_be_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS["lora"](tiny.outline(config), **settings)


def test_added_tokens_go_with_an_adapter_of_the_output():
    config = dataclasses.replace(UNTIED, added=(66, 3))
    method, net, _, params = made(config, dict(targets=("head",)))
    batch = tiny.batch()
    close(tiny.logits(tiny.build(config), method.fold(params), batch), tiny.logits(net, params, batch))


def test_what_also_learns_is_trained_saved_and_loaded_and_nothing_else_is(home, tmp_path):
    method = {"name": "lora", "rank": 2, "targets": ("q", "embed", "head"), "also": ("^norm/", "attn_norm/scale")}
    config = runs.config(home, method=method, train__steps=3, eval={"every": 3})
    trained = tuning.train(config, tmp_path / "run")
    model = tuning.load(tmp_path / "run")
    np.testing.assert_allclose(api.evaluate(model, config)["loss"], trained["eval/loss"], rtol=1e-5)
    leaves, published = tree.flatten(model.params), tree.flatten(tuning.load(home / "model").params)
    changed = {name for name, x in published.items() if not np.array_equal(x, leaves[name])}
    assert changed == {"norm/scale", "blocks/0-1/attn_norm/scale"} == set(build.base_leaves(model.model))

    model.export(tmp_path / "peft", format="peft")
    config["model"]["adapter"] = str(tmp_path / "peft")
    begun = build.parts(config)
    start = tree.flatten(weights.start_params(begun.model, 0))
    assert all(np.array_equal(start[name], x) for name, x in leaves.items())
    config["method"] = {key: value for key, value in method.items() if key != "also"}
    with pytest.raises(ValueError, match=r"brings along blocks/0-1/attn_norm/scale, norm/scale, which.*method\.also="):
        build.parts(config)
