"""The methods that change kernels by few numbers, against PEFT's layers, and what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tuning
from tests import runs, tiny
from tuning import api
from tuning.core import tree
from tuning.methods import METHODS
from tuning.methods.lokr import split
from tuning.methods.vera import Shared
from tuning.models import network
from tuning.nn.dropout import dropout
from tuning.nn.linear import Linear
from tuning.nn.sites import NOTHING, Outline, Site

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SITES = (Site("attn/q", (24, 32), ("embed", "heads"), range(1)), Site("mlp/down", (48, 30), ("mlp", "embed"), range(1)))
OUTLINE = Outline(layers=1, sites=SITES, leaves=())
# Ours -> PEFT's. A matrix of theirs is the transpose of ours.
NAMES = {
    "a": "lora_A.default.weight", "b": "lora_B.default.weight", "magnitude": "lora_magnitude_vector.default.weight",
    **{w: f"hada_{w}.default" for w in ("w1_a", "w1_b", "w2_a", "w2_b")},
}  # fmt: skip
LOKR = {w: f"lokr_{w}.default" for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
VERA = {"lambda_d": "vera_lambda_d.default", "lambda_b": "vera_lambda_b.default"}

CASES = {
    "lora": ("lora", dict(rank=4, alpha=6.0), peft.LoraConfig, dict(r=4, lora_alpha=6), NAMES),
    "patterns": (
        "lora", dict(rank=4, alpha=6.0, ranks=("attn/.*=2", "q=3"), alphas=("mlp/down=5.5",)),
        peft.LoraConfig, dict(r=4, lora_alpha=6, rank_pattern={"q": 2}, alpha_pattern={"down": 5.5}), NAMES,
    ),
    "dora": ("lora", dict(rank=4, alpha=6.0, dora=True), peft.LoraConfig, dict(r=4, lora_alpha=6, use_dora=True), NAMES),
    "stable dora": (
        "lora", dict(rank=4, alpha=6.0, dora=True, rank_stabilized=True),
        peft.LoraConfig, dict(r=4, lora_alpha=6, use_dora=True, use_rslora=True), NAMES,
    ),
    "pissa": (
        "lora", dict(rank=4, alpha=6.0, init="pissa"), peft.LoraConfig, dict(r=4, lora_alpha=6, init_lora_weights="pissa"), NAMES,
    ),
    "olora and dora": (
        "lora", dict(rank=4, alpha=6.0, init="olora", dora=True),
        peft.LoraConfig, dict(r=4, lora_alpha=6, init_lora_weights="olora", use_dora=True), NAMES,
    ),
    "vera": ("vera", dict(rank=16), peft.VeraConfig, dict(r=16), VERA),
    "loha": ("loha", dict(rank=4, alpha=6.0), peft.LoHaConfig, dict(r=4, alpha=6), NAMES),
    "lokr": ("lokr", dict(rank=2, alpha=3.0), peft.LoKrConfig, dict(r=2, alpha=3), LOKR),
    "lokr of whole factors": ("lokr", dict(rank=8, factor=4), peft.LoKrConfig, dict(r=8, alpha=8, decompose_factor=4), LOKR),
    "lokr of thin factors": (
        "lokr", dict(rank=1, alpha=3.0, decompose_both=True), peft.LoKrConfig, dict(r=1, alpha=3, decompose_both=True), LOKR,
    ),
}  # fmt: skip


class Layers:
    """The projections of SITES with what a method answers there; the leaves of each, as a stack of one layer has them."""

    def __init__(self, name, **settings):
        self.method = METHODS[name](OUTLINE, **settings)
        make = lambda site: lambda rngs: Linear(site, self.method.sites, rngs, bias=True)  # noqa: E731
        self.nets = {site.role: network.build(make(site)) for site in SITES}
        fresh = {role: tree.flatten(jax.jit(net.init)(jax.random.key(i))) for i, (role, net) in enumerate(self.nets.items())}
        self.params = tree.unflatten({f"{role}/{name}": x[None] for role, leaves in fresh.items() for name, x in leaves.items()})
        self.base = {n: np.asarray(x) for n, x in tree.flatten(self.params).items() if "/adapter/" not in n}

    def moved(self, seed=0):
        """The start, with all leaves of adapters that learn changed at random."""
        rng = np.random.default_rng(seed)
        learns = lambda name: "/adapter/" in name and self.method.pace(name).rate > 0  # noqa: E731
        start = self.method.start(self.params)
        return tree.map_named(lambda n, x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype) if learns(n) else x, start)

    def apply(self, role, params, x, key=None):
        own = functools.reduce(dict.__getitem__, role.split("/"), params)
        return _apply(self.nets[role], jax.tree.map(lambda leaf: leaf[0], own), x, key)


@jax.jit(static_argnums=0)
def _apply(net, params, x, key):
    with nnx.use_eager_sharding(False):
        state = jax.tree.map(lambda leaf: leaf, net.structure)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(net.graph, state)(x, key)


def twin(ours, config, settings, **more):
    """PEFT on torch's layers of the same weights: {role: layer}."""
    model = torch.nn.ModuleDict({site.role.split("/")[1]: torch.nn.Linear(*site.shape) for site in SITES})
    with torch.no_grad():
        for site in SITES:
            layer = model[site.role.split("/")[1]]
            layer.weight.copy_(tensor(ours.base[f"{site.role}/kernel"][0].T))
            layer.bias.copy_(tensor(ours.base[f"{site.role}/bias"][0]))
    wrapped = peft.get_peft_model(model, config(target_modules=["q", "down"], **settings, **more))
    return {site.role: wrapped.base_model.model[site.role.split("/")[1]].eval() for site in SITES}


def tensor(x):
    return torch.tensor(np.array(x))


def adapters(params, role, fixed=False):
    """The leaves of a role's adapter: those that learn, or those that stay."""
    node = functools.reduce(dict.__getitem__, role.split("/"), params)["adapter"]
    return {name: np.asarray(leaf[0]) for name, leaf in node.items() if (name in ("a0", "b0")) == fixed}


def give(layer, own, names):
    """PEFT's layer takes our leaves; each has a place there, and none of its own is left."""
    theirs = {n: p for n, p in layer.named_parameters() if "base_layer" not in n}
    assert {names[name] for name in own} == set(theirs)
    with torch.no_grad():
        for name, value in own.items():
            theirs[names[name]].copy_(tensor(value.T))


def near(ours, theirs, bound=1e-5):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=bound * max(1.0, np.abs(theirs).max()))


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    name, settings, config, theirs, names = CASES[request.param]
    ours = Layers(name, **settings)
    return ours, twin(ours, config, theirs), names


def test_outputs_gradients_and_folded_kernels_are_pefts(pair):
    ours, layers, names = pair
    params = ours.moved()
    folded = tree.flatten(jax.jit(ours.method.fold)(params))
    assert set(folded) == set(ours.base)
    for site in SITES:
        layer, own = layers[site.role], adapters(params, site.role)
        give(layer, own, names)
        x, seen = (np.random.default_rng(i).normal(size=(5, size)).astype(np.float32) for i, size in enumerate(site.shape))
        y = layer(tensor(x))
        near(ours.apply(site.role, params, x), y)
        assert np.abs(y.detach().numpy() - x @ ours.base[f"{site.role}/kernel"][0]).max() > 0.05
        (y * tensor(seen)).sum().backward()
        gradient = jax.grad(lambda p, site=site, x=x, seen=seen: (ours.apply(site.role, p, x) * seen).sum())(params)
        theirs = dict(layer.named_parameters())
        for name, value in adapters(gradient, site.role).items():
            near(value.T, theirs[names[name]].grad)
        assert not any(value.any() for value in adapters(gradient, site.role, fixed=True).values())
        layer.merge()
        near(folded[f"{site.role}/kernel"][0].T, layer.base_layer.weight, 1e-6)


def test_a_start_is_the_base_and_has_pefts_sizes(pair):
    ours, layers, names = pair
    start = ours.method.start(ours.params)
    for site in SITES:
        x = np.random.default_rng(5).normal(size=(5, site.shape[0])).astype(np.float32)
        near(ours.apply(site.role, start, x), x @ ours.base[f"{site.role}/kernel"][0] + ours.base[f"{site.role}/bias"][0])
        shapes = {n: tuple(p.shape) for n, p in layers[site.role].named_parameters() if "base_layer" not in n}
        assert {names[name]: value.T.shape for name, value in adapters(start, site.role).items()} == shapes
        assert all(ours.method.tuned(f"{site.role}/adapter/{name}") for name in adapters(start, site.role))
        assert not ours.method.tuned(f"{site.role}/kernel") and not ours.method.tuned(f"{site.role}/bias")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_a_start_takes_from_the_kernel_is_what_peft_takes(init):
    ours = Layers("lora", rank=4, alpha=6.0, init=init, dora=True)
    layers = twin(ours, peft.LoraConfig, dict(r=4, lora_alpha=6, init_lora_weights=init, use_dora=True))
    start = ours.method.start(ours.params)
    folded = tree.flatten(jax.jit(ours.method.fold)(start))
    for site in SITES:
        layer, own, kernel = layers[site.role], adapters(start, site.role), ours.base[f"{site.role}/kernel"][0]
        fixed = adapters(start, site.role, fixed=True)
        assert np.array_equal(own["a"], fixed["a0"]) and np.array_equal(own["b"], fixed["b0"])
        near((kernel - 1.5 * fixed["a0"] @ fixed["b0"]).T, layer.base_layer.weight)
        a_RD, b_FR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        near(own["a"] @ own["b"], (b_FR @ a_RD).T)
        near(own["a"] @ own["a"].T, a_RD.T @ a_RD)  # without the signs of singular vectors, which mean nothing
        near(own["magnitude"], layer.lora_magnitude_vector["default"].weight)
        near(folded[f"{site.role}/kernel"][0], kernel, 1e-6)
    assert ours.method.pace("blocks/0-3/attn/q/adapter/a0").rate == ours.method.pace("blocks/0-3/attn/q/adapter/b0").rate == 0


@pytest.mark.parametrize(("init", "dora"), [("default", True), ("pissa", False), ("pissa", True)])
def test_dropout_falls_where_it_falls_in_peft(init, dora):
    ours, key = Layers("lora", rank=4, alpha=6.0, dropout=0.4, dora=dora, init=init), jax.random.key(3)
    theirs = dict(r=4, lora_alpha=6, lora_dropout=0.4, use_dora=dora, init_lora_weights=True if init == "default" else init)
    layers, params = twin(ours, peft.LoraConfig, theirs), ours.moved()
    for site in SITES:
        layer = layers[site.role]
        give(layer, adapters(params, site.role), NAMES)
        x = np.random.default_rng(5).normal(size=(5, site.shape[0])).astype(np.float32)

        class Same(torch.nn.Module):  # drops what ours drops
            def forward(self, _, x=x):
                return tensor(dropout(jnp.asarray(x), 0.4, key))

        layer.lora_dropout["default"] = Same()
        got = ours.apply(site.role, params, x, key)
        near(got, layer.train()(tensor(x)))
        assert np.abs(got - ours.apply(site.role, params, x)).max() > 0.05


def test_an_orthogonal_start_changes_nothing_though_no_factor_is_zero():
    ours = Layers("lora", rank=4, init="orthogonal")
    for site in SITES:
        own = adapters(ours.params, site.role)
        assert min(np.abs(own["a"]).min(), np.abs(own["b"]).min()) > 0
        np.testing.assert_allclose([own["a"].std(), own["b"].std()], 0.005**0.5, rtol=0.25)
        np.testing.assert_allclose(own["a"] @ own["b"], 0, atol=1e-7)


def test_a_gaussian_start_has_the_deviation_of_one_over_the_rank():
    ours = Layers("lora", rank=8, init="gaussian")
    own = adapters(ours.params, "mlp/down")
    np.testing.assert_allclose(own["a"].std(), 1 / 8, rtol=0.1)
    assert not own["b"].any()


def test_the_first_pattern_that_names_a_site_gives_its_rank_and_alpha():
    method = METHODS["lora"](tiny.outline(), rank=8, ranks=("attn/q=2", "attn/.*=3"), alphas=("down=64",), targets=("attn/.*", "down"))
    abstract = tree.flatten(tiny.build(sites=method.sites).abstract)
    ranks = {n.split("/")[-3]: x.shape[-1] for n, x in abstract.items() if n.endswith("adapter/a")}
    assert ranks == {"q": 2, "k": 3, "v": 3, "o": 3, "down": 8}
    ones = {n: jnp.zeros(x.shape) if n.endswith("kernel") else jnp.ones(x.shape) for n, x in abstract.items()}
    folded = tree.flatten(method.fold(tree.unflatten(ones)))
    change = {role: float(folded[f"blocks/0-3/{role}/kernel"].max()) for role in ("attn/q", "attn/k", "mlp/down", "mlp/up")}
    assert change == {"attn/q": 32, "attn/k": 32, "mlp/down": 64, "mlp/up": 0}  # alpha / rank times rank


def test_b_may_learn_faster():
    pace = METHODS["lora"](OUTLINE, b_rate=16.0, dora=True).pace
    assert [pace(f"blocks/0-3/attn/q/adapter/{leaf}").rate for leaf in ("a", "b", "magnitude")] == [1, 16, 1]


def test_widths_are_split_as_peft_splits_them():
    from peft.tuners.lokr.layer import factorization

    assert all(split(width, factor) == factorization(width, factor) for width in range(1, 130) for factor in (-1, 1, 2, 3, 8, 100))


def test_veras_projections_are_shared_and_no_leaves():
    method = METHODS["vera"](tiny.outline(), rank=5)
    learns, rests = tree.split(tiny.build(sites=method.sites).abstract, method.tuned)
    assert set(tree.flatten(rests)) == set(tree.flatten(tiny.build(sites=NOTHING).abstract))
    assert {n.rsplit("/", 1)[1]: x.shape for n, x in tree.flatten(learns).items() if "attn/q" in n} == {
        "lambda_d": (4, 5),
        "lambda_b": (4, 32),
    }
    one, other = (Shared(48, 30, 16, seed).draw()[0] for seed in (0, 1))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_allclose([one.std(), Shared(48, 30, 16, 0).draw()[1].std()], [(2 / 48) ** 0.5, (2 / 16) ** 0.5], rtol=0.1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {"init": "eva"}, "init='eva' is not one of default, gaussian, orthogonal, pissa, olora, loftq"),
        ("lora", {"init": "orthogonal", "rank": 3}, "that of attn/q is 3: set an even one"),
        ("lora", {"init": "pissa", "rank": 25}, r"kernel \(24, 32\) \(attn/q\) has no 25 directions"),
        ("lora", {"ranks": ("q",)}, "ranks: 'q' is not a role and a number; write for example attn/q=8"),
        ("lora", {"ranks": ("q=2.5",)}, "'q=2.5' is not a role and a number"),
        ("lora", {"ranks": ("q=0",)}, "ranks gives {'attn/q': 0}"),
        ("lora", {"alphas": ("down=2",), "targets": ("q",)}, "alphas: 'down' names none of the sites that method.targets choose: attn/q"),
        ("lora", {"alpha": -1.0}, "alpha=-1.0"),
        ("lora", {"b_rate": 0.0}, "b_rate=0.0"),
        ("vera", {"rank": 0}, "rank=0"),
        ("vera", {"targets": ("qkv",)}, "'qkv' matches no site"),
        ("loha", {"rank": -1}, "rank=-1"),
        ("lokr", {"factor": 0}, "factor=0"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](OUTLINE, **settings)


def test_a_run_from_the_kernels_own_directions_is_loaded_as_it_was(home, tmp_path):
    method = {"name": "lora", "rank": 4, "ranks": ("attn/.*=2",), "init": "pissa", "dora": True, "b_rate": 2.0}
    config = runs.config(home, method=method, train__steps=3, eval={"every": 3})
    trained = tuning.train(config, tmp_path / "run")
    model = tuning.load(tmp_path / "run")
    np.testing.assert_allclose(api.evaluate(model, config)["loss"], trained["eval/loss"], rtol=1e-5)
    leaves, published = tree.flatten(model.params), tree.flatten(tuning.load(home / "model").params)
    assert all(np.array_equal(leaves[name], x) for name, x in published.items())
    start = tree.flatten(model.model.method.start(model.params))
    for name in leaves.keys() - published.keys():
        if name.endswith(("/a0", "/b0")):
            np.testing.assert_allclose(leaves[name], start[name], atol=1e-5)
        else:
            assert np.abs(leaves[name] - start[name]).max() > 1e-3
