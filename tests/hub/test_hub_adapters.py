"""PEFT directories, both ways, against peft itself."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning.core import tree
from tuning.hub import adapters, files
from tuning.methods.lora import lora
from tuning.models import network

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SETTINGS = dict(name="lora", rank=4, alpha=6.0, dropout=0.1)


def with_lora(ours, directory, cuts=(), added=(0, 0), **settings):
    """Our network with LoRA, its parameters all random where a checkpoint says nothing."""
    config = ours(directory).config
    outline = network.outline(config.construct, config.layers)
    settings = {**SETTINGS, **settings}
    method = lora(outline, **{key: value for key, value in settings.items() if key != "name"})
    net = ours(directory, sites=method.sites, cuts=cuts, added=added)
    rng = np.random.default_rng(3)
    net.leaves = tree.map_named(lambda _, leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), net.extra)
    net.full = tree.merge(net.params, net.leaves)
    net.method, net.outline = method, outline
    net.written = lambda directory, leaves=None, added=added, **more: adapters.write(
        directory, leaves or net.leaves, net.table, outline, {**settings, **more}, added=added, base_model="owner/name", revision="main"
    )
    return net


def peft_logits(base, directory, tokens, rows=None):
    model = checkpoints.reference(base)
    if rows:
        model.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft says only by a warning that it found nothing
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers renamed
        model = peft.PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize(
    ("family", "targets", "stabilized", "cuts"),
    [
        ("llama2", ("all",), True, (2,)),
        ("qwen2", ("attn/q", "down"), False, ()),
        ("llama3", ("attn/.*",), False, ()),
        ("gpt2", ("all",), False, (1,)),
        ("gpt2", ("attn/o", "up"), True, ()),
        ("falcon_alibi", ("all",), False, ()),
        ("mixtral", ("attn/.*",), False, ()),
    ],
)
def test_peft_loads_ours_and_gives_our_logits(family, targets, stabilized, cuts, tmp_path, ours, checkpoint_of, ours_of):
    net = with_lora(ours, checkpoint_of(family), cuts, targets=targets, rank_stabilized=stabilized)
    net.written(tmp_path)
    tokens = checkpoints.tokens(2, 12)
    mine = net.logits(tokens, params=net.full)
    assert_same(mine, peft_logits(checkpoint_of(family), tmp_path, tokens))
    assert np.abs(mine - ours_of(family).logits(tokens)).max() > 0.01  # the adapter does something
    assert_same(mine, ours_of(family).logits(tokens, params=whole(net.method.fold(net.full), ours_of(family))))


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("all",), ["c_attn", "c_fc", "c_proj"]), (("qkv", "up"), ["c_attn", "c_fc"]),
        (("attn/o", "up"), r"transformer\.h\.(\d+)\.attn\.c_proj|transformer\.h\.(\d+)\.mlp\.c_fc"),
    ],
)  # fmt: skip
def test_modules_whose_names_end_alike_are_told_apart(targets, modules, tmp_path, ours, checkpoint_of):
    net = with_lora(ours, checkpoint_of("gpt2"), targets=targets)
    net.written(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["target_modules"] == modules and said["fan_in_fan_out"] is True
    adapters.settings(tmp_path, net.table, net.outline)  # raises where target_modules names others than have tensors


def whole(params, plain):
    """Parameters of a cut stack as those of the uncut one."""
    leaves, joined = tree.flatten(params), {}
    for name, leaf in tree.flatten(plain.network.abstract).items():
        kind = name.split("/", 2)[2] if name.startswith("blocks/") else None
        parts = [
            value for other, value in sorted(leaves.items()) if kind and other.startswith("blocks/") and other.split("/", 2)[2] == kind
        ]
        joined[name] = jnp.concatenate(parts) if parts else leaves[name]
        assert joined[name].shape == leaf.shape
    return tree.unflatten(joined)


@pytest.mark.parametrize(
    ("family", "modules", "roles"),
    [
        ("mistral", ["q_proj", "up_proj"], ("attn/q", "mlp/up")), ("qwen3", ["q_proj", "up_proj"], ("attn/q", "mlp/up")),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], ("attn/qkv", "attn/o", "mlp/up", "mlp/down")), ("gpt2", ["mlp.c_proj"], ("mlp/down",)),
    ],
)  # fmt: skip
def test_we_load_what_peft_wrote_and_give_its_logits(family, modules, roles, tmp_path, ours, checkpoint_of):
    model = checkpoints.reference(checkpoint_of(family))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, use_rslora=True, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    tokens = checkpoints.tokens(2, 12)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    bare = with_lora(ours, checkpoint_of(family))
    said, added, saved = adapters.settings(tmp_path, bare.table, bare.outline)
    plain = dict(ranks=(), alphas=(), dora=False)
    assert said == dict(name="lora", rank=3, alpha=7.0, dropout=0.0, rank_stabilized=True, targets=roles, **plain)
    assert (added, saved) == ((0, 0), ())
    net = with_lora(ours, checkpoint_of(family), cuts=(1,), **said)
    leaves = adapters.read(tmp_path, net.extra, net.table)
    assert_same(net.logits(tokens, params=tree.merge(net.params, leaves)), theirs)


@pytest.mark.parametrize("family", ["llama2", "llama3"])
@pytest.mark.parametrize("first", [97, 100])
def test_rows_of_added_tokens_travel_to_peft_and_back(family, first, tmp_path, ours, checkpoint_of):
    net = with_lora(ours, checkpoint_of(family), added=(first, 2))
    assert ("head" in net.leaves) == (family == "llama2")
    net.written(tmp_path)
    tokens = checkpoints.tokens(2, 12)
    tokens[:, 3], tokens[:, 7] = first, first + 1
    rows = max(100, first + 2)
    theirs = peft_logits(checkpoint_of(family), tmp_path, tokens, rows)
    assert_same(net.logits(tokens, params=net.full), theirs)
    assert adapters.settings(tmp_path, net.table, net.outline).added == (first, 2)


@pytest.mark.parametrize(("family", "where"), [("llama2", {"embed_tokens": [97, 98], "lm_head": [97, 98]}), ("llama3", [97, 98])])
def test_rows_that_peft_trained_are_read(family, where, tmp_path, ours, checkpoint_of):
    model = checkpoints.reference(checkpoint_of(family))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=where, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delta" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    net = with_lora(ours, checkpoint_of(family), added=(97, 2), targets=("q",))
    assert adapters.settings(tmp_path, net.table, net.outline).added == (97, 2)
    leaves = adapters.read(tmp_path, net.extra, net.table)
    tokens = checkpoints.tokens(2, 12)
    tokens[:, 3], tokens[:, 7] = 97, 98
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    assert_same(net.logits(tokens, params=tree.merge(net.params, leaves)), theirs)


@pytest.fixture(scope="module")
def written(tmp_path_factory, ours, checkpoint_of):
    net = with_lora(ours, checkpoint_of("llama2"), targets=("q", "v"))
    return net, net.written(tmp_path_factory.mktemp("adapter"))


def altered(written, tmp_path, tensors=lambda values: None, **config):
    """A copy of the written adapter, with keys and tensors changed."""
    net, directory = written
    files.write_json(tmp_path / "adapter_config.json", {**files.read_json(directory / "adapter_config.json"), **config})
    held = files.Tensors(directory, "adapter_model")
    values = {name: held.read(name) for name in held}
    values = tensors(values) or values
    files.write(tmp_path, values.items(), stem="adapter_model")
    adapters.settings(tmp_path, net.table, net.outline)
    return adapters.read(tmp_path, net.extra, net.table)


def test_the_written_files_are_plain_and_exact(written):
    net, directory = written
    said = json.loads((directory / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "v_proj"] and said["r"] == 4 and said["lora_alpha"] == 6 and said["lora_dropout"] == 0.1
    back = tree.flatten(adapters.read(directory, net.extra, net.table))
    assert all(np.array_equal(back[name], value) for name, value in tree.flatten(net.leaves).items())
    assert "trainable_token_indices" not in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]), ("bias", "all"), ("rank_pattern", {"layers.0.self_attn.q_proj": 8}),
        ("alpha_pattern", {r"layers\.[01].*": 8}), ("layers_to_transform", [0]), ("layers_to_transform", 0),
        ("lora_bias", True), ("peft_type", "BOFT"), ("peft_type", "OFT"), ("exclude_modules", ["k_proj"]),
        ("init_lora_weights", "pissa"), ("target_parameters", ["experts"]), ("task_type", "SEQ_CLS"), ("loftq_config", {"bits": 4}),
        ("layer_replication", [[0, 2]]), ("some_later_key", 0.5), ("r", 0), ("trainable_token_indices", [3, 5]),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_honoured_is_an_error_that_names_it(key, value, written, tmp_path):
    with pytest.raises(ValueError, match=key if key != "r" else "r=0"):
        altered(written, tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (dict(use_dora=True), "dora", True), (dict(rank_pattern={"q_proj": 8}), "ranks", ("attn/q=8",)),
        (dict(alpha_pattern={"self_attn.v_proj": 3.5, "k_proj": 1}), "alphas", ("attn/v=3.5",)),
    ],
)  # fmt: skip
def test_a_key_that_can_be_honoured_reaches_the_method(config, key, value, written, tmp_path):
    net, directory = written
    files.write_json(tmp_path / "adapter_config.json", {**files.read_json(directory / "adapter_config.json"), **config})
    files.write(
        tmp_path, [(name, held.read(name)) for held in [files.Tensors(directory, "adapter_model")] for name in held], stem="adapter_model"
    )
    before, after = (adapters.settings(place, net.table, net.outline).method for place in (directory, tmp_path))
    assert after == {**before, key: value} != before


def test_keys_without_effect_are_read_over(written, tmp_path):
    altered(
        written,
        tmp_path,
        fan_in_fan_out=True,
        lora_bias=False,
        exclude_modules=None,
        peft_version="9",
        auto_mapping=None,
        eva_config=None,
        loftq_config={},
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda v: {n: x for n, x in v.items() if "layers.1.self_attn.q_proj.lora_B" not in n},
            r"missing \(1\): .*layers.1.self_attn.q_proj.lora_B",
        ),
        (lambda v: {n.removeprefix("base_model.model."): x for n, x in v.items()}, "no part of a LORA"),
        (lambda v: {n.replace("model.model.model.", "model.model."): x for n, x in v.items()}, "not projections of this network"),
        (lambda v: {n.replace("layers.2", "layers.7"): x for n, x in v.items()}, "not projections of this network"),
        (lambda v: {**v, "base_model.model.lm_head.weight": np.zeros((100, 32), np.float32)}, "modules_to_save.*lm_head.*not named by it"),
        (lambda v: {n.replace("v_proj", "o_proj"): x for n, x in v.items()}, "target_modules"),
        (lambda v: {n: x.T if "lora_A" in n else x for n, x in v.items()}, r"wrong shape \(6\).*expected \(4, 32\)"),
        (
            lambda v: {n: x for n, x in v.items() if "layers.2" not in n},
            r"layers.2.self_attn.q_proj .attn/q. has no tensors, and is named by it",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error(change, said, written, tmp_path):
    with pytest.raises(ValueError, match=said):
        altered(written, tmp_path, change)


@pytest.mark.parametrize("target", [r".*self_attn\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]])
def test_target_modules_is_read_by_pefts_rule(target, written, tmp_path):
    altered(written, tmp_path, target_modules=target)


def test_adapters_in_some_layers_only_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match=r"some layers only.*layers.2.self_attn.q_proj"):
        altered(
            written,
            tmp_path,
            lambda v: {n: x for n, x in v.items() if "layers.2" not in n},
            target_modules=r"model\.layers\.[01]\.self_attn\.[qv]_proj",
        )


def test_all_linear_must_have_all_tensors(written, tmp_path):
    with pytest.raises(ValueError, match=r"k_proj.*has no tensors"):
        altered(written, tmp_path, target_modules="all-linear")


def test_a_pickle_is_refused(tmp_path, written):
    files.write_json(tmp_path / "adapter_config.json", files.read_json(written[1] / "adapter_config.json"))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.bin.*can run code"):
        adapters.settings(tmp_path, written[0].table, written[0].outline)


def test_leaves_that_peft_could_not_hold_are_refused(tmp_path, written):
    net, _ = written
    flat = tree.flatten(net.leaves)
    with pytest.raises(ValueError, match="all layers"):
        net.written(tmp_path, tree.unflatten({name.replace("blocks/0-2", "blocks/0-1"): x[:2] for name, x in flat.items()}))
    with pytest.raises(ValueError, match="not lora's"):
        net.written(tmp_path, tree.unflatten({name.replace("adapter/a", "adapter/scale"): x for name, x in flat.items()}))
    with pytest.raises(ValueError, match="not rank=5"):
        net.written(tmp_path, rank=5)
    with pytest.raises(ValueError, match="no adapter of method 'bottleneck'"):
        net.written(tmp_path, name="bottleneck")


def test_what_is_written_is_read_back(tmp_path, written, monkeypatch):
    net, _ = written
    honest = files._write_file
    monkeypatch.setattr(files, "_write_file", lambda file, tensors: honest(file, {n: x + 1 for n, x in tensors.items()}))
    with pytest.raises(ValueError, match="differ from what was written"):
        net.written(tmp_path, jax.tree.map(np.asarray, net.leaves))
