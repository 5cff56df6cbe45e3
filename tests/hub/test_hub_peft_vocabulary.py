"""PEFT directories whose adapters stand at the embedding or the output, or with which weights of the base go, against peft itself."""

import json

import jax
import numpy as np
import pytest

import tuning
from tests import checkpoints
from tests.hub.test_hub_peft_methods import close, decoded, held, loaded, logits, made, peft_logits, reference, tuned, with_method
from tuning import build, export, weights
from tuning.core import mesh, tree
from tuning.hub import adapters, files
from tuning.loaded import LoadedModel
from tuning.methods import METHODS
from tuning.source import pretrained

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

LORA = dict(name="lora", rank=4, alpha=6.0, dropout=0.0, rank_stabilized=False, dora=False)
TASK = {"bert_masked": None, "t5_gated": "SEQ_2_SEQ_LM"}
# Family, our targets and numbers by role, and how a user of peft names the targets.
PLACES = {
    "llama2": (("attn/q", "embed", "head"), dict(ranks=("embed=3", "head=2"), alphas=("head=5",)), ["q_proj", "embed_tokens", "lm_head"]),
    "llama3": (("attn/q", "embed"), dict(ranks=("embed=3",), alphas=("embed=5",)), ["q_proj", "embed_tokens"]),
    "gemma2": (("embed",), {}, ["embed_tokens"]),
    "gpt2": (("attn/qkv", "embed"), dict(ranks=("embed=2",)), ["c_attn", "wte", "lm_head"]),
    "bert_masked": (("attn/q", "embed"), {}, ["query", "word_embeddings", "lm_head"]),
    "t5_gated": (("decoder/attn/q", "encoder/attn/q", "decoder/cross/q", "head"), dict(ranks=("head=2",)), ["q", "lm_head"]),
}
TIED = ("llama3", "gemma2", "gpt2", "bert_masked")


def said_of(family):
    targets, numbers, _ = PLACES[family]
    return {**LORA, "targets": targets, "ranks": (), "alphas": (), **numbers}


def shared(family):
    return [{"bert_masked": "cls.predictions.decoder"}.get(family, "lm_head")] if family in TIED else []


@pytest.mark.parametrize("family", PLACES)
def test_peft_loads_what_we_wrote_and_gives_our_logits(family, tmp_path, ours, checkpoint_of):
    said = said_of(family)
    net = tuned(ours, checkpoint_of(family), said)
    adapters.write(tmp_path, net.leaves, net.table, net.outline, said, task_type=TASK.get(family, "CAUSAL_LM"), copies=shared(family))
    tokens = checkpoints.tokens(2, 9)
    mine = logits(net, net.leaves, tokens)
    base = reference(checkpoint_of(family), family)
    plain = peft_logits(base, tokens)
    model = loaded(base, tmp_path)
    close(mine, peft_logits(model, tokens))
    assert np.abs(mine - plain).max() > 0.01
    heard = adapters.settings(tmp_path, net.table, net.outline).method
    assert {**heard, "targets": set(heard["targets"])} == {**said, "targets": set(said["targets"])}
    if family not in TIED:  # where peft merges wrongly
        folded, merged = tree.flatten(net.method.fold(tree.merge(net.params, net.leaves))), model.merge_and_unload().state_dict()
        for row in net.table:
            if row.leaf in ("embed/table", "head/kernel"):
                got, want = np.asarray(folded[row.leaf]), merged[row.tensor].numpy()
                np.testing.assert_allclose(got.T if row.transposed else got, want, rtol=0, atol=1e-6 * max(1, np.abs(want).max()))


def named_again(directory, modules):
    """The directory with target_modules as the user gave them: peft forgets those that it ties, and would not tie them again."""
    config = files.read_json(directory / "adapter_config.json")
    files.write_json(directory / "adapter_config.json", {**config, "target_modules": modules})


@pytest.mark.parametrize("family", PLACES)
def test_what_peft_wrote_is_read_and_written_again_the_same(family, tmp_path, checkpoint_of):
    modules = PLACES[family][2]
    patterns = {"rank_pattern": dict(lm_head=2, embed_tokens=3)} if family == "llama2" else {}
    task = "FEATURE_EXTRACTION" if family == "bert_masked" else TASK.get(family, "CAUSAL_LM")
    base = reference(checkpoint_of(family), family)
    tying = dict(ensure_weight_tying=True) if family in TIED else {}
    model = made(base, "Lora", dict(r=4, lora_alpha=6, target_modules=modules, task_type=task, **patterns, **tying), tmp_path / "theirs")
    tokens = checkpoints.tokens(2, 9)
    refused = {"gpt2": "tied to the embedding, and PEFT would change one of them alone", "bert_masked": "other values than the embedding"}
    if family in refused:
        with pytest.raises(ValueError, match=refused[family]):
            tuning.load(checkpoint_of(family), adapter=tmp_path / "theirs")
        if family == "bert_masked":  # peft let them go apart
            return
        named_again(tmp_path / "theirs", modules)
    again = tuning.load(checkpoint_of(family), adapter=tmp_path / "theirs")
    assert set(again.method["targets"]) == set(PLACES[family][0])
    more = dict(decoder_tokens_BT=decoded(tokens)) if family == "t5_gated" else {}
    close(np.asarray(again.logits(tokens, **more)), peft_logits(model, tokens))
    again.export(tmp_path / "ours", format="peft")
    want, have = held(tmp_path / "theirs"), held(tmp_path / "ours")
    assert have.keys() == {name for name in want if ".base_layer." not in name}
    assert all(np.array_equal(want[name], value) for name, value in have.items())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, checkpoint_of):
    """(family) -> what peft writes for its embedding and output"""
    found = {}
    for family in ("llama2", "llama3"):
        tying = dict(ensure_weight_tying=True) if family == "llama3" else {}
        found[family] = tmp_path_factory.mktemp(family)
        config = dict(r=4, target_modules=PLACES[family][2], task_type="CAUSAL_LM", **tying)
        made(reference(checkpoint_of(family), family), "Lora", config, found[family])
    return found


EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.mark.parametrize(
    ("family", "config", "change", "said"),
    [
        ("llama2", {}, lambda v: {n + ".weight" if "embedding_" in n else n: x for n, x in v.items()}, "no part of a LORA adapter.*weight"),
        ("llama2", {}, lambda v: {**v, f"{EMBED}.base_layer.weight": v[f"{EMBED}.base_layer.weight"] + 1}, "not what this base has there"),
        ("llama2", {}, lambda v: {**v, f"{HEAD}.base_layer.weight": v[f"{HEAD}.base_layer.weight"] + 1}, "not what this base has there"),
        ("llama2", {}, lambda v: {n: x.T if "lora_embedding_A" in n else x for n, x in v.items()}, "wrong shape"),
        ("llama2", dict(target_modules=["q_proj", "embed_tokens"]), None, r"lm_head \(head\) has tensors, and is not named by it"),
        ("llama2", dict(target_modules="all-linear"), None, r"k_proj .attn/k. has no tensors"),
        ("llama3", dict(ensure_weight_tying=False), None, "ensure_weight_tying=False.*Train with ensure_weight_tying=True"),
        ("llama3", {}, lambda v: {n: x for n, x in v.items() if "lm_head" not in n}, "would change one of them alone"),
        ("llama3", {}, lambda v: {**v, f"{HEAD}.lora_B.weight": v[f"{HEAD}.lora_B.weight"] + 1}, "other values than the embedding"),
        ("llama3", dict(rank_pattern={"lm_head": 8}), None, "rank_pattern.*differs among"),
    ],
)  # fmt: skip
def test_a_directory_that_does_not_fit_is_an_error(family, config, change, said, theirs, tmp_path, checkpoint_of):
    files.write_json(tmp_path / "adapter_config.json", {**files.read_json(theirs[family] / "adapter_config.json"), **config})
    files.write(tmp_path, (change or (lambda values: values))(held(theirs[family])).items(), stem="adapter_model")
    with pytest.raises(ValueError, match=said):
        tuning.load(checkpoint_of(family), adapter=tmp_path)


def test_pefts_embedding_of_an_encoder_decoder_is_refused_both_ways(tmp_path, ours, checkpoint_of):
    said = {**LORA, "targets": ("embed",)}
    net = tuned(ours, checkpoint_of("t5"), said)
    with pytest.raises(ValueError, match="for modules of their own"):
        adapters.write(
            tmp_path, net.leaves, net.table, net.outline, said, task_type="SEQ_2_SEQ_LM",
            copies=["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
        )  # fmt: skip
    config = dict(r=4, target_modules=["shared"], task_type="SEQ_2_SEQ_LM")
    made(reference(checkpoint_of("t5_gated"), "t5_gated"), "Lora", config, tmp_path)
    net = tuned(ours, checkpoint_of("t5_gated"), {"name": "full"})
    with pytest.raises(ValueError, match="apart from what encoder and decoder look up"):
        adapters.settings(tmp_path, net.table, net.outline)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("more", [dict(rank_stabilized=True, ranks=("q=2",), alphas=("o=5.0",)), dict(dora=True)])
def test_what_started_from_the_kernels_is_a_plain_lora_of_twice_the_rank(init, more, tmp_path, ours, checkpoint_of):
    said = {**LORA, "targets": ("attn/q", "attn/o", "head"), "init": init, **more}
    net = tuned(ours, checkpoint_of("llama2"), said)
    adapters.write(tmp_path, net.leaves, net.table, net.outline, said)
    tokens = checkpoints.tokens(2, 9)
    mine = logits(net, net.leaves, tokens)
    close(mine, peft_logits(loaded(reference(checkpoint_of("llama2"), "llama2"), tmp_path), tokens))
    heard = adapters.settings(tmp_path, net.table, net.outline).method
    assert heard["rank"] == 8 and heard["alpha"] == 6 * (2**0.5 if heard["rank_stabilized"] else 2)
    assert heard["ranks"] == (("attn/q=4",) if "ranks" in more else ())
    again = with_method(ours, checkpoint_of("llama2"), net.outline, heard)
    close(logits(again, adapters.read(tmp_path, again.extra, net.table), tokens), mine)


def with_also(base, method, also, directory):
    """A model whose adapter and further leaves are moved, written as a PEFT directory."""
    where = mesh.over(jax.devices()[:1])
    with jax.set_mesh(where):
        source = pretrained(path=str(base))
        settings = {**method, "also": also}
        chosen = METHODS[method["name"]](build.outline(source), **{key: value for key, value in settings.items() if key != "name"})
        m, rng = build.model(source, chosen, where), np.random.default_rng(3)
        moved = lambda n, x: x + rng.normal(size=x.shape).astype(np.float32) * 0.3 if m.tuned(n) else x  # noqa: E731
        params = tree.map_named(moved, weights.base_params(m, lambda name: True, 0))
        export.write(m, params, settings, directory, "peft", merge=False)
    return LoadedModel(m, params, ())


@pytest.mark.parametrize(
    ("family", "method", "also", "modules"),
    [
        ("llama2", LORA, ("^norm/",), ["model.norm"]),
        ("llama2", dict(name="ia3"), ("_norm/scale", "head/kernel"), ["input_layernorm", "lm_head", "post_attention_layernorm"]),
        ("llama3", LORA, ("embed/table",), ["embed_tokens", "lm_head"]),
        ("gpt2", LORA, ("embed/table", "attn_norm/scale"), ["lm_head", "ln_1", "wte"]),
        ("bert_masked", dict(name="loha", rank=3), ("embed_norm/bias",), ["embeddings.LayerNorm"]),
    ],
)
def test_leaves_that_learned_beside_an_adapter_travel_both_ways(family, method, also, modules, tmp_path, checkpoint_of):
    mine = with_also(checkpoint_of(family), method, also, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == modules
    tokens = checkpoints.tokens(2, 9)
    model = reference(checkpoint_of(family), family)
    close(np.asarray(mine.logits(tokens)), peft_logits(loaded(model, tmp_path), tokens))
    again = tuning.load(checkpoint_of(family), adapter=tmp_path)
    read, learned = tree.flatten(again.params), {n for n in tree.flatten(mine.params) if mine.model.tuned(n)}
    assert all(np.array_equal(read[name], value) for name, value in tree.flatten(mine.params).items())
    assert all(again.model.tuned(name) for name in learned)


@pytest.mark.parametrize(
    ("family", "modules", "tying"),
    [("llama2", ["norm"], {}), ("llama2", ["lm_head", "embed_tokens"], {}), ("llama3", ["embed_tokens"], dict(ensure_weight_tying=True))],
)
def test_modules_that_peft_saved_are_read_by_its_rule(family, modules, tying, tmp_path, checkpoint_of):
    config = dict(r=3, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM", **tying)
    model = made(reference(checkpoint_of(family), family), "Lora", config, tmp_path)
    again = tuning.load(checkpoint_of(family), adapter=tmp_path)
    tokens = checkpoints.tokens(2, 9)
    close(np.asarray(again.logits(tokens)), peft_logits(model, tokens))
    learned = {n for n in tree.flatten(again.params) if again.model.tuned(n) and "/adapter/" not in n}
    norms = {"blocks/0-2/attn_norm/scale", "blocks/0-2/mlp_norm/scale", "norm/scale"}  # whose names end with "norm" there
    assert learned == {"norm": norms, "lm_head": {"head/kernel", "embed/table"}, "embed_tokens": {"embed/table"}}[modules[0]]


@pytest.mark.parametrize(
    ("family", "modules", "change", "said"),
    [
        ("llama3", ["embed_tokens"], None, "lm_head and the embedding have the same weights.*ensure_weight_tying"),
        ("llama3", ["lm_head"], None, "one of them alone was trained"),
        ("llama2", ["norm"], lambda v: {n: x for n, x in v.items() if "1.input_layer" not in n}, "1.input_layernorm.weight is named"),
        ("llama2", ["model.norm"], lambda v: {**v, f"{HEAD}.weight": np.zeros((100, 32), np.float32)}, "lm_head.weight is in the file"),
        ("llama2", ["layers.0.mlp"], None, "for some layers only"),
    ],
)  # fmt: skip
def test_saved_modules_that_do_not_fit_are_an_error(family, modules, change, said, tmp_path, checkpoint_of):
    config = dict(r=3, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    made(reference(checkpoint_of(family), family), "Lora", config, tmp_path)
    if change:
        (tmp_path / "changed").mkdir()
        files.write_json(tmp_path / "changed" / "adapter_config.json", files.read_json(tmp_path / "adapter_config.json"))
        files.write(tmp_path / "changed", change(held(tmp_path)).items(), stem="adapter_model")
    with pytest.raises(ValueError, match=said):
        tuning.load(checkpoint_of(family), adapter=tmp_path / "changed" if change else tmp_path)


@pytest.mark.parametrize(
    ("method", "also", "said"),
    [
        (LORA, ("attn/q/kernel",), "either adapts a module or trains it whole: model.layers.0.self_attn.q_proj"),
        (dict(name="prompt", length=3), ("^norm/",), "PEFT trains nothing else with prompt"),
        (dict(name="tokens", ids=(5,)), ("^norm/",), "PEFT trains nothing else with tokens"),
        (LORA, ("bias$",), r"method.also: 'bias\$' matches no leaf"),
    ],
)
def test_what_cannot_learn_beside_an_adapter_is_refused(method, also, said, tmp_path, checkpoint_of):
    with pytest.raises(ValueError, match=said):
        with_also(checkpoint_of("llama2"), method, also, tmp_path)
