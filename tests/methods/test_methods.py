"""The contract that every tuning method keeps, and what is particular to each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tuning.core import tree
from tuning.methods import METHODS
from tuning.models.transformer import TransformerConfig

# One way to call each method; a new entry of the table needs one here, and gets every test below.
SETTINGS = {
    "full": {}, "partial": {"last_layers": 2}, "lora": {"rank": 4},
    "adalora": {"init_rank": 4, "target_rank": 3, "alpha": 100.0}, "vera": {}, "loha": {"rank": 4}, "lokr": {"rank": 4}, "ia3": {},
    "bottleneck": {"width": 8}, "prompt": {"length": 4}, "p_tuning": {"length": 4, "hidden": 8}, "prefix": {"length": 4},
    "tokens": {"ids": (5, 7, 11)},
}  # fmt: skip
AT_ONCE = ("prompt", "p_tuning", "prefix")  # what they add is there from the start


@pytest.fixture(params=METHODS, scope="module")
def case(request):
    method = METHODS[request.param](tiny.outline(), **SETTINGS[request.param])
    net = tiny.build(sites=method.sites, cuts=method.cuts)
    return request.param, method, net, method.start(tiny.init(net))


def base_of(net, params):
    """The same weights in the plain network, with its stack uncut."""
    leaves = {}
    for name, leaf in tree.flatten(params).items():
        if "/adapter/" in name:
            continue
        parts = name.split("/")
        leaves.setdefault("/".join(["blocks", "0-3", *parts[2:]]) if parts[0] == "blocks" else name, []).append((name, leaf))
    ordered = {n: [x for _, x in sorted(items, key=lambda item: item[0])] for n, items in leaves.items()}
    return tree.unflatten({n: jnp.concatenate(xs) if len(xs) > 1 else xs[0] for n, xs in ordered.items()})


logits = tiny.logits


def test_a_method_starts_exactly_at_the_base(case):
    name, _, net, params = case
    batch = tiny.batch()
    same = np.array_equal(logits(net, params, batch), logits(tiny.build(), base_of(net, params), batch))
    assert same == (name not in AT_ONCE)


def test_some_leaf_learns_and_folding_keeps_the_logits(case):
    _, method, net, params = case
    learns = {n for n in tree.flatten(params) if method.tuned(n)}
    assert learns
    moved = tree.map_named(lambda n, x: x + 0.05 * jax.random.normal(jax.random.key(len(n)), x.shape) if n in learns else x, params)
    batch = tiny.batch()
    if method.fold is None:
        assert float(jnp.abs(logits(net, moved, batch) - logits(net, params, batch)).max()) > 1e-2
        return
    folded = method.fold(moved)
    assert not any("/adapter/" in n for n in tree.flatten(folded))
    got = logits(tiny.build(), base_of(net, folded), batch)
    expected = logits(net, moved, batch)
    assert float(jnp.abs(expected - logits(net, params, batch)).max()) > 1e-2
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, float(jnp.abs(expected).max())))


def test_lora_has_the_published_number_of_parameters():
    config = TransformerConfig(vocab_size=67, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, hidden=14336, max_length=64)
    for targets, expected in ((("all",), 41_943_040), (("q", "v"), 6_815_744)):
        method = METHODS["lora"](tiny.outline(config), rank=16, targets=targets)
        learns, _ = tree.split(tiny.build(config, method.sites).abstract, method.tuned)
        assert tree.size(learns) == expected


def test_rank_stabilised_scale_divides_by_the_root_of_the_rank():
    plain, stable = (METHODS["lora"](tiny.outline(), rank=16, alpha=8.0, rank_stabilized=flag) for flag in (False, True))
    net = tiny.build(sites=plain.sites)
    params = tiny.init(net)
    zero = tree.map_named(lambda n, x: jnp.zeros_like(x) if n.endswith("kernel") else jnp.ones_like(x), params)
    ratio = stable.fold(zero)["blocks"]["0-3"]["attn"]["q"]["kernel"] / plain.fold(zero)["blocks"]["0-3"]["attn"]["q"]["kernel"]
    np.testing.assert_allclose(ratio, 4.0, rtol=1e-6)


def test_targets_are_roles_or_regular_expressions():
    def adapted(*targets):
        method = METHODS["lora"](tiny.outline(), targets=targets)
        names = tree.flatten(tiny.build(sites=method.sites).abstract)
        return {n.split("/")[-3] for n in names if n.endswith("adapter/a")}

    assert adapted("q", "mlp/down") == {"q", "down"}
    assert adapted("attn/.*") == {"q", "k", "v", "o"}
    assert adapted("all") == {"q", "k", "v", "o", "gate", "up", "down"}


def test_dropout_acts_in_training_only():
    method = METHODS["lora"](tiny.outline(), dropout=0.5)
    net = tiny.build(sites=method.sites)
    params = jax.tree.map(lambda x: x + 0.05, tiny.init(net))
    batch = tiny.batch()
    plain = logits(net, params, batch)
    one, again, other = (logits(net, params, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3 and float(jnp.abs(one - plain).max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {"rank": 0}, "rank=0"),
        ("lora", {"dropout": 1.0}, "dropout=1.0"),
        ("lora", {"targets": ("qkv",)}, "'qkv' matches no site.*attn/q, attn/k"),
        ("lora", {"targets": ()}, "matches no site"),
        ("partial", {}, "Partial tuning of nothing"),
        ("partial", {"leaves": "bias$"}, "matches no leaf"),
        ("partial", {"last_layers": 5}, "the model has 4 layers"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](tiny.outline(), **settings)


def test_the_head_of_a_tied_model_is_explained():
    import dataclasses

    with pytest.raises(ValueError, match="tied to embed/table"):
        METHODS["partial"](tiny.outline(dataclasses.replace(tiny.CONFIG, tied=True)), leaves="^head/")
