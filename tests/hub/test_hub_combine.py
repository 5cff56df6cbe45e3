"""Several adapters over one base: combined as peft combines them, switched, exported, refused."""

import contextlib

import jax
import numpy as np
import pytest

import tuning
from tests import checkpoints
from tuning import build, weights
from tuning.__main__ import main
from tuning.core import mesh, tree
from tuning.hub import checkpoint, names
from tuning.loaded import LoadedModel
from tuning.methods import METHODS
from tuning.methods.combine import KINDS, layer_keys
from tuning.source import pretrained

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from peft.utils import merge_utils  # noqa: E402

TOKENS = checkpoints.tokens(2, 12)
# What peft is told to adapt: by the adapter "left" and its twin, and by the others.
TARGETS = {"llama2": (["q_proj", "down_proj"], ["q_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["c_attn"])}
ADAPTERS = {
    "left": dict(r=4, lora_alpha=6), "twin": dict(r=4, lora_alpha=6, lora_dropout=0.1),
    "right": dict(r=4, lora_alpha=3, use_rslora=True), "thin": dict(r=3, lora_alpha=9),
}  # fmt: skip
WEIGHTS = (0.7, -0.6, 0.4)
# A case: how, the adapters, what else is said.
CASES = {
    **{
        how: (how, ("left", "right") if kind.of == "factors" else ("left", "thin"), {"density": 0.4} if kind.prune else {})
        for how, kind in KINDS.items()
    },
    "stabilised first": ("linear", ("right", "left"), {}),
    "three": ("ties", ("twin", "left", "right"), {"density": 0.5}),
    "by frequency": ("ties", ("left", "right", "twin"), {"density": 0.8, "majority_sign_method": "frequency"}),
    "fewer": ("svd", ("left", "right"), {"svd_rank": 2}),
}
PAIRS = [*((case, "llama2") for case in CASES), *((case, "gpt2") for case in ("linear", "dare_ties_svd"))]


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.3)


@pytest.fixture(scope="module")
def both_of(checkpoint_of, tmp_path_factory):
    """family -> (peft's model with ADAPTERS, ours with the same, their directory)."""
    made = {}

    def both(family):
        if family in made:
            return made[family]
        first, other = TARGETS[family]
        configs = {
            name: peft.LoraConfig(target_modules=first if name in ("left", "twin") else other, task_type="CAUSAL_LM", **said)
            for name, said in ADAPTERS.items()
        }
        theirs = peft.get_peft_model(checkpoints.reference(checkpoint_of(family)), configs["left"], adapter_name="left").eval()
        for name in ("twin", "right", "thin"):
            theirs.add_adapter(name, configs[name])
        randomise(theirs)
        home = tmp_path_factory.mktemp(f"{family}_adapters")
        theirs.save_pretrained(home)
        ours = tuning.load(checkpoint_of(family))
        for name in ADAPTERS:
            ours.add(name, home / name)
        return made.setdefault(family, (theirs, ours, home))

    return both


def logits(model):
    model.eval()  # what an added adapter drops, too
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_same(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5 * max(1, np.abs(want).max()), rtol=0)


def masks(theirs, ours, chosen, of, density, seed):
    """What our DARE keeps, in the order in which peft asks for it."""
    leaves = {name: x for name, x in tree.flatten(ours.params).items() if name.startswith("blocks/") and name.endswith("/kernel")}
    where = {
        f"base_model.model.{tensor.removesuffix('.weight')}": (name.removesuffix("/kernel"), layer, x.shape)
        for name, x in leaves.items()
        for layer, tensor in enumerate(names.place(name, x.shape, ours.model.source.table).tensors)
    }
    for module, layer in theirs.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        place, at, (layers, D, F) = where[module]
        having = [layer.r[adapter] for adapter in chosen if adapter in layer.lora_A]
        shapes = {"kernel": lambda r, D=D, F=F: (D, F)} if of == "change" else {"a": lambda r, D=D: (D, r), "b": lambda r, F=F: (r, F)}
        for leaf, shape in shapes.items():
            for n, r in enumerate(having):
                mask = jax.random.bernoulli(layer_keys(seed, n, f"{place}/{leaf}", layers)[at], density, shape(r))
                yield mask if of == "change" and layer.fan_in_fan_out else mask.T


@pytest.mark.parametrize(("case", "family"), PAIRS)
def test_every_kind_gives_the_logits_of_peft(case, family, both_of, monkeypatch):
    theirs, ours, _ = both_of(family)
    how, chosen, settings = CASES[case]
    kind, weights = KINDS[how], WEIGHTS[: len(chosen)]
    drawn = masks(theirs, ours, chosen, kind.of, settings.get("density"), seed=3)

    def prune(tensor, density, rescale):
        return tensor * torch.tensor(np.asarray(next(drawn))) / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    theirs.add_weighted_adapter(list(chosen), list(weights), "made", combination_type=how, **settings)
    for layer in (module for module in theirs.modules() if isinstance(module, peft.tuners.lora.LoraLayer) and "made" in module.scaling):
        assert layer.scaling["made"] == (2 if chosen[0] == "right" else 1)  # a copied use_rslora doubles what is scaled already
        layer.scaling["made"] = 1
    theirs.set_adapter("made")
    want = logits(theirs)
    theirs.set_adapter("left")
    theirs.delete_adapter("made")
    assert kind.prune != "random" or next(drawn, None) is None  # peft asked for all of them
    ours.combine(case, dict(zip(chosen, weights, strict=True)), how=how, seed=3, **settings)
    ours.use(case)
    assert_same(ours.logits(TOKENS), want)
    ours.use(None)
    assert np.abs(np.asarray(ours.logits(TOKENS)) - want).max() > 0.01


@contextlib.contextmanager
def compiled():
    """The programs that are compiled inside."""
    found = []
    listen = lambda event, duration, **more: found.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_adapters_are_switched_over_one_base_and_compiled_once(both_of):
    theirs, ours, _ = both_of("llama2")
    wanted = {}
    for name in ADAPTERS:
        theirs.set_adapter(name)
        wanted[name] = logits(theirs)
    with theirs.disable_adapter():
        wanted[None] = logits(theirs)
    bases = {}
    for name in ("left", None, "thin"):
        ours.use(name)
        assert ours.active == name
        assert_same(ours.logits(TOKENS), wanted[name])
        bases[name] = {leaf: x for leaf, x in tree.flatten(ours.params).items() if "/adapter/" not in leaf}
    assert all(x is bases["left"][leaf] and x is bases["thin"][leaf] for leaf, x in bases[None].items())
    assert bases["left"].keys() == bases[None].keys() == bases["thin"].keys()
    with compiled() as programs:
        for name in ("twin", "left", "thin", None, "twin"):  # of the twin, whose numbers alone are others, for the first time
            ours.use(name)
            assert_same(ours.logits(TOKENS), wanted[name])
        assert programs == []
        jax.jit(lambda x: x + 1.5)(np.ones(3)).block_until_ready()
        assert programs != []
    assert np.abs(wanted["twin"] - wanted["left"]).max() > 0.01


def test_what_was_combined_is_exported_and_gives_the_same_logits_in_peft(both_of, checkpoint_of, tmp_path):
    _, ours, _ = both_of("llama2")
    base = checkpoint_of("llama2")
    for how, settings in {"cat": {}, "ties": {"density": 0.5}}.items():
        ours.combine(f"exported {how}", {"left": 0.5, "right": 1.5}, how=how, **settings)
        ours.use(f"exported {how}")
        ours.export(tmp_path / how, format="peft")
        assert_same(ours.logits(TOKENS), logits(peft.PeftModel.from_pretrained(checkpoints.reference(base), tmp_path / how)))
    mine = np.asarray(ours.logits(TOKENS))
    ours.export(tmp_path / "hf", merge=True)
    assert_same(mine, logits(checkpoints.reference(tmp_path / "hf")))
    again = tuning.load(base, adapter=tmp_path / "ties")
    assert (again.names, again.active) == (("default",), "default")
    assert all(np.array_equal(x, tree.flatten(ours.params)[name]) for name, x in tree.flatten(again.params).items())
    assert ours.run is None


def test_the_command_reads_no_weight_of_the_base_and_writes_the_same(both_of, checkpoint_of, tmp_path, monkeypatch, capsys):
    _, ours, home = both_of("llama2")
    ours.combine("said", {"left": 0.5, "thin": -0.25}, how="dare_ties_svd", density=0.5, svd_rank=5, seed=1)
    ours.use("said")
    monkeypatch.setattr(checkpoint, "load", None)
    words = f"--adapters={home}/left,{home}/thin --how=dare_ties_svd --density=0.5 --svd_rank=5 --seed=1 --out={tmp_path}/made".split()
    assert main(["combine", f"--base={checkpoint_of('llama2')}", "--weights=0.5,-0.25", *words]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/made"
    made = peft.PeftModel.from_pretrained(checkpoints.reference(checkpoint_of("llama2")), tmp_path / "made")
    assert_same(ours.logits(TOKENS), logits(made))
    assert main(["combine", f"--base={checkpoint_of('llama2')}", "--weights=0.5", *words]) == 2
    assert "There are 2 adapters and 1 weights" in capsys.readouterr().err


def test_changes_that_are_no_products_are_combined_whole(checkpoint_of, tmp_path):
    ours, kernels = tuning.load(checkpoint_of("llama2")), []
    for name, config in {
        "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    }.items():
        model = peft.get_peft_model(checkpoints.reference(checkpoint_of("llama2")), config)
        torch.manual_seed(2)
        with torch.no_grad():
            for _, parameter in (pair for pair in model.named_parameters() if "lora_B" in pair[0] or "hada_w2_a" in pair[0]):
                parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        ours.add(name, tmp_path / name)
        kernels.append(model.merge_and_unload().state_dict())
    mean = checkpoints.reference(checkpoint_of("llama2"))
    mean.load_state_dict({name: (x + kernels[1][name]) / 2 for name, x in kernels[0].items()})
    ours.combine("both", {"dora": 0.5, "loha": 0.5}, how="svd", svd_rank=32)
    ours.use("both")
    assert_same(ours.logits(TOKENS), logits(mean))
    with pytest.raises(ValueError, match=r"q by a product A B alone. Use a kind that ends in svd"):
        ours.combine("sum", {"dora": 0.5}, how="cat")
    with pytest.raises(ValueError, match=r"has no rank that the result could take. Give svd_rank"):
        ours.combine("sum", {"loha": 0.5}, how="svd")


def test_adapters_of_the_embedding_and_the_output_are_combined(checkpoint_of, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(checkpoints.reference(checkpoint_of("llama2")), config, adapter_name="left")
    theirs.add_adapter("right", config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tuning.load(checkpoint_of("llama2"))
    for name in ("left", "right"):
        ours.add(name, tmp_path / name)
    for how, settings in {"ties_svd": {"density": 0.5}, "magnitude_prune": {"density": 0.3}}.items():
        theirs.add_weighted_adapter(["left", "right"], [0.7, -0.6], how, combination_type=how, **settings)
        theirs.set_adapter(how)
        ours.combine(how, {"left": 0.7, "right": -0.6}, how=how, **settings)
        ours.use(how)
        assert_same(ours.logits(TOKENS), logits(theirs))


def test_factors_that_began_at_the_kernels_own_are_combined_whole(checkpoint_of):
    source, where = pretrained(path=str(checkpoint_of("llama2"))), mesh.over(jax.devices()[:1])
    said = dict(rank=4, alpha=6.0, targets=("attn/q", "mlp/down"), init="pissa")
    m = build.model(source, METHODS["lora"](build.outline(source), **said), where)
    grown = lambda name, x: x * 1.5 if name.endswith(("/a", "/b")) else x  # noqa: E731
    params = tree.map_named(grown, m.method.start(weights.base_params(m, lambda name: True, 0)))
    ours = LoadedModel(m, params, (), {"name": "lora", **said})
    assert (ours.names, ours.active) == (("default",), "default")
    ours.combine("twice", {"default": 2.0}, svd_rank=8)
    ours.use("twice")
    got, once, base = (tree.flatten(x) for x in (ours.model.method.fold(ours.params), m.method.fold(params), params))
    for name in ("blocks/0-2/attn/q/kernel", "blocks/0-2/mlp/down/kernel"):
        change = np.asarray(once[name] - base[name])
        assert np.abs(change).max() > 0.1
        assert_same(got[name] - base[name], 2 * change)


def test_one_adapter_becomes_the_nearest_of_a_lower_rank(both_of):
    _, ours, _ = both_of("llama2")
    ours.combine("near", {"left": 1.0}, svd_rank=2)
    changes = {}
    for name in ("left", "near"):
        ours.use(name)
        leaves = tree.flatten(ours.params)
        a, b = (np.asarray(leaves[f"blocks/0-2/mlp/down/adapter/{part}"]) for part in "ab")
        changes[name] = a @ b * (6 / 4 if name == "left" else 1)
    assert a.shape == (3, 48, 2)
    u, s, v = np.linalg.svd(changes["left"])
    assert_same(changes["near"], (u[:, :, :2] * s[:, None, :2]) @ v[:, :2])


def test_an_adapter_with_a_head_is_one_of_several(checkpoint_of, both_of, tmp_path):
    base = checkpoint_of("llama2")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="SEQ_CLS"))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tuning.load(base)
    table = ours.params["embed"]["table"]
    ours.add("judge", tmp_path)
    ours.add("left", both_of("llama2")[2] / "left")
    ours.use("judge")
    assert ours.config.head.classes == ("LABEL_0", "LABEL_1", "LABEL_2") and ours.params["embed"]["table"] is table
    assert_same(ours.logits(TOKENS), logits(theirs))
    with pytest.raises(ValueError, match="An adapter brings along head/kernel, which cannot be combined"):
        ours.combine("mean", {"judge": 0.5, "left": 0.5}, how="cat")
    ours.use(None)
    assert ours.params["head"]["kernel"].shape == (32, 100) and not ours.config.head.classes
    alone = tuning.load(base, adapter=tmp_path)
    with pytest.raises(ValueError, match=r"With the adapter, head/kernel came into the model. Load the base alone"):
        alone.use(None)
    assert alone.active == "default" and alone.config.head.classes


PRUNED = {"how": "ties", "density": 0.5}


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ({"left": 1.0}, {"how": "tie"}, "how='tie' is not one of linear, ties"),
        ({"left": 1.0}, {"how": "ties"}, "how='ties' prunes: give density"),
        ({"left": 1.0}, {"how": "dare_ties", "density": 0.0}, r"density=0.0: the share of values to keep lies in \(0, 1\]"),
        ({"left": 1.0}, {"how": "ties", "density": 20}, "density=20: the share"),
        ({"left": 1.0}, {"how": "linear", "density": 0.5}, "how='linear' has no use for density"),
        ({"left": 1.0}, {"how": "cat", "svd_rank": 4}, "how='cat' has no use for svd_rank"),
        ({"left": 1.0}, {"how": "svd", "svd_rank": 0}, "svd_rank=0: a rank is at least 1"),
        ({"left": 1.0}, {**PRUNED, "majority_sign_method": "mean"}, "majority_sign_method='mean' is not one of total, frequency"),
        ({"left": 1.0}, {"majority_sign_method": "frequency"}, "how='svd' has no use for majority_sign_method"),
        ({"left": 1.0, "thin": 1.0}, PRUNED, r"how='ties' needs adapters of one rank, and at blocks/0-2/attn/q they have \[3, 4\]"),
        ({"lefd": 1.0}, {}, "There is no adapter 'lefd'. Did you mean left?"),
        ({}, {}, "Adapters and finite weights are needed"),
        ({"left": float("nan")}, {}, "Adapters and finite weights are needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(weights, settings, message, both_of):
    _, ours, _ = both_of("llama2")
    there = ours.names
    with pytest.raises(ValueError, match=message):
        ours.combine("refused", weights, **settings)
    assert ours.names == there


def test_names_bases_and_methods_that_do_not_fit_are_refused(both_of, checkpoint_of, tmp_path):
    _, ours, home = both_of("llama2")
    with pytest.raises(ValueError, match="There is an adapter 'left' already"):
        ours.add("left", home / "right")
    with pytest.raises(ValueError, match="There is an adapter 'left' already"):
        ours.combine("left", {"right": 1.0})
    with pytest.raises(ValueError, match="There is no adapter 'new'"):
        ours.use("new")
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(checkpoints.reference(checkpoint_of("llama2")), prompt).save_pretrained(tmp_path)
    ours.add("prompt", tmp_path)
    with pytest.raises(ValueError, match=r"An adapter of method 'prompt' at .* changes more than a kernel"):
        ours.combine("mean", {"prompt": 0.5, "left": 0.5}, svd_rank=4)
    tuned = tuning.load(checkpoint_of("llama2"))
    tuned.run = tmp_path  # as if it had been tuned there, fully
    with pytest.raises(ValueError, match=r"changed the weights of its base. Export it as it is, with --format=hf"):
        tuned.add("left", home / "left")
