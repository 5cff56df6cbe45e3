"""A base in few bits: it computes as the values of its codes do, is read slice by slice, and no tuning moves it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import tuning
from tests import checkpoints, runs
from tests.methods.test_contract import batch_of, logits
from tests.methods.test_methods import SETTINGS
from tuning import build, weights
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.hub import files, slices
from tuning.hub.names import Place
from tuning.methods import METHODS
from tuning.nn import quantised, storage, weight
from tuning.nn.quantised import Quantised
from tuning.nn.storage import Storage
from tuning.source import pretrained
from tuning.training import state, writer
from tuning.training.checkpoint import Checkpoints

ONE = meshes.over(jax.devices()[:1])
ROUTED = meshes.over(jax.devices(), fsdp=2, expert=2, tensor=2)
MIXED = meshes.over(jax.devices()[:4], fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda family: checkpoints.tiny(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return runs.make_home(tmp_path_factory.mktemp("home"))


def made(folder, where=ONE, method="lora", quantise="nf4", block=16, settings=None, **source):
    """A model on a quantised base, with its parameters moved so that what was added does something."""
    source = pretrained(path=str(folder), quantise=quantise, quantise_block=block, **source)
    m = build.model(source, METHODS[method](build.outline(source), **(SETTINGS[method] if settings is None else settings)), where)
    params = weights.start_params(m, 0)
    push = lambda name, x: x + 0.05 * jax.random.normal(jax.random.key(len(name)), x.shape) if m.tuned(name) else x  # noqa: E731
    return m, tree.map_named(push, params)


def values(params):
    """The same parameters with every kernel as an array."""
    return tree.map_named(lambda _, leaf: weight.value(leaf), params)


def in_codes(params):
    return {name: leaf for name, leaf in tree.flatten(params).items() if isinstance(leaf, Quantised)}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


# Of qwen3_moe the codes of one projection of the experts cannot be split over `tensor` as its values can.
CASES = [("llama2", "nf4", MIXED), ("gpt2", "int8", MIXED), ("bert_masked", "int4", ONE), ("t5", "nf4", MIXED),
         ("mixtral", "nf4", ROUTED), ("qwen3_moe", "int8", ROUTED)]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "where"), CASES, ids=lambda x: str(x.size) if isinstance(x, Mesh) else x)
def test_logits_and_gradients_are_those_of_the_values(family, kind, where, folder_of):
    with jax.set_mesh(where):
        m, params = made(folder_of(family), where, quantise=kind, block=8 if family == "qwen3_moe" else 16)
        batch = jax.device_put(batch_of(m.source, 0), meshes.rows(where))
        kept = list(in_codes(m.layout))
        assert kept == [n for n in tree.flatten(m.layout) if re.search("blocks/.*(?<!router)(?<!/adapter)/kernel$", n)]
        tuned, frozen = tree.split(params, m.tuned)

        def loss(tuned, frozen):
            out = logits(m.network, tree.merge(tuned, frozen), batch)
            return (out**2).mean(), out

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, ours), ours_grads = run(tuned, frozen)
        (_, theirs), their_grads = run(tuned, values(frozen))
    close(ours, theirs)
    for name, grad in tree.flatten(ours_grads).items():
        close(grad, tree.flatten(their_grads)[name])


@pytest.mark.parametrize("name", ["lora", "lokr", "ia3", "bottleneck"])  # what multiplies, adds to, scales and leaves the kernel
def test_what_is_added_starts_and_folds_as_on_the_values(name, folder_of):
    with jax.set_mesh(ONE):
        m, params = made(folder_of("llama2"), method=name)
        batch = jax.device_put(batch_of(m.source, m.method.slots), meshes.rows(ONE))
        ours = logits(m.network, params, batch)
        close(ours, logits(m.network, values(params), batch))
        if m.method.fold is not None:
            plain = build.model(pretrained(path=str(folder_of("llama2"))), METHODS["full"](build.outline(m.source)), ONE)
            close(logits(plain.network, values(m.method.fold(params)), batch), ours)


@pytest.mark.parametrize("settings", [{"dora": True}, {"init": "pissa"}, {"init": "olora", "dora": True}])
def test_lora_that_starts_from_the_kernels_starts_from_their_values(settings, folder_of):
    with jax.set_mesh(ONE):
        source = pretrained(path=str(folder_of("llama2")), quantise="nf4", quantise_block=16)
        m = build.model(source, METHODS["lora"](build.outline(source), rank=4, **settings), ONE)
        base = weights.base_params(m, lambda name: True, 0)
        # Singular vectors turn a last bit into a hundred: the values are those that a program makes, as in the start itself.
        begun, plain = m.method.start(base), m.method.start(jax.jit(values)(base))
        for name, leaf in tree.flatten(begun).items():
            if "/adapter/" in name:
                close(leaf, tree.flatten(plain)[name])


@pytest.mark.parametrize("where", [ONE, MIXED], ids=["one", "mixed"])
def test_loftq_starts_with_the_best_low_rank_part_of_what_quantising_took(where, folder_of, monkeypatch):
    monkeypatch.setattr(slices, "SMALL_BYTES", 0)
    with jax.set_mesh(where):
        source = pretrained(path=str(folder_of("llama2")), quantise="nf4", quantise_block=16, quantise_except=("o=none",))
        m = build.model(source, METHODS["lora"](build.outline(source), rank=4, alpha=8.0, init="loftq"), where)
        leaves = tree.flatten(weights.start_params(m, 0))
        plain = build.model(pretrained(path=source.path), METHODS["full"](build.outline(source)), where)
        published = tree.flatten(weights.base_params(plain, lambda name: True, 0))
    for name in tree.flatten(m.layout):
        if name.endswith("/kernel") and "blocks" in name:
            a, b = (np.asarray(leaves[name.replace("kernel", f"adapter/{leaf}")], np.float64) for leaf in "ab")
            error = np.asarray(published[name], np.float64) - np.asarray(weight.value(leaves[name]), np.float64)
            left = np.linalg.norm(error - 2.0 * a @ b, axis=(1, 2))
            singular = np.linalg.svd(error, compute_uv=False)
            np.testing.assert_allclose(left, np.linalg.norm(singular[:, 4:], axis=1), rtol=1e-5, atol=1e-7)
            assert "/o/" in name or (left < 0.9 * np.linalg.norm(singular, axis=1)).all()


def test_a_base_in_codes_is_tuned_and_stays_as_it_is(home, tmp_path):
    config = runs.config(home, model__quantise="nf4", model__quantise_block=16, train__steps=12, method__dropout=0.0)
    final = tuning.train(config, tmp_path / "run")
    base = tuning.load(home / "model")
    model = tuning.load(tmp_path / "run")
    kernels = in_codes(model.params)
    assert len(kernels) == 7
    for name, kernel in kernels.items():
        expected = jax.jit(Storage("nf4", 16, True).quantise)(tree.flatten(base.params)[name])
        jax.tree.map(np.testing.assert_array_equal, kernel, expected)
    losses = [line["eval/loss"] for line in writer.read(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in line]
    assert final["eval/loss"] == losses[-1] < losses[0] - 0.5, losses
    again = tuning.load(model.export(tmp_path / "merged", format="hf", merge=True))
    tokens = np.arange(3, 19).reshape(2, 8)
    close(again.logits(tokens), model.logits(tokens))
    assert not in_codes(again.params)
    with pytest.raises(ValueError, match="is a run, which keeps its base as"):
        tuning.load(tmp_path / "run", quantise="nf4")


def test_an_adapter_is_put_on_a_base_in_codes_and_others_beside_it(home, tmp_path):
    wide = checkpoints.tiny("llama2", tmp_path / "wide", vocab_size=len(tuning.load(home / "model").tokenizer), hidden_size=64,
                            intermediate_size=128)  # fmt: skip
    for file in (home / "model").glob("*token*"):
        (wide / file.name).write_bytes(file.read_bytes())
    tuning.train(runs.config(home, model__path=str(wide), model__quantise="nf4"), tmp_path / "run")
    run = tuning.load(tmp_path / "run")
    peft = run.export(tmp_path / "peft", format="peft")
    model = tuning.load(wide, adapter=peft, quantise="nf4")
    tokens = np.arange(3, 19).reshape(2, 8)
    assert len(in_codes(model.params)) == 7
    close(model.logits(tokens), run.logits(tokens))
    kernels = in_codes(model.params)
    model.add("twin", peft)
    model.combine("both", {"default": 0.5, "twin": 0.5}, how="svd")
    model.use("both")
    assert all(leaf is kernels[name] for name, leaf in in_codes(model.params).items())
    np.testing.assert_allclose(model.logits(tokens), run.logits(tokens), atol=1e-4)
    model.use(None)
    alone = tuning.load(wide, quantise="nf4")
    assert len(in_codes(alone.params)) == 7
    assert np.array_equal(alone.logits(tokens), model.logits(tokens))
    assert not np.array_equal(alone.logits(tokens), tuning.load(wide).logits(tokens))


@pytest.mark.parametrize("where", [ONE, MIXED, meshes.over(jax.devices(), fsdp=8)], ids=["one", "mixed", "fsdp"])
def test_a_kernel_is_quantised_tensor_by_tensor_where_its_codes_belong(where, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SMALL_BYTES", 0)
    L, D, F = 3, 128, 48
    kernels = np.random.default_rng(0).normal(size=(L, D, F)).astype(np.float32)
    files.write(tmp_path, {f"t{i}": np.ascontiguousarray(kernels[i].T) for i in range(L)}.items(), shard_bytes=2**20)
    kept = Storage("nf4", 16)
    like = state.layout({"k": jax.ShapeDtypeStruct(kernels.shape, jnp.float32)}, {"k": ("layers", "embed", "mlp")},
                        lambda name: "float32", where, {"k": kept}.get)["k"]  # fmt: skip
    seen, store = [], storage.into(like)

    def watched(part):
        seen.append(part.shape)
        return store(part)

    place = Place(tuple(f"t{i}" for i in range(L)), (L,), True)
    leaf = slices.read(files.Tensors(tmp_path), place, kernels.shape, like.sharding, np.dtype(np.float32), watched)
    assert seen == [(1, D, F)] * L
    jax.tree.map(np.testing.assert_array_equal, leaf, jax.jit(kept.quantise)(kernels))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), leaf, like))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(leaf))
    whole = kernels.size * quantised.bytes_per_parameter("nf4", 16, True)
    assert held <= 1.25 * whole / math.prod(where.shape[axis] for axis in ("fsdp", "tensor"))  # steps of few outputs cost more


def test_bytes_of_a_base_are_counted_and_so_are_its_parameters(folder_of):
    source = pretrained(path=str(checkpoints.tiny("llama2", folder_of("llama2").parent / "wide", hidden_size=256, intermediate_size=512)),
                        quantise="nf4")  # fmt: skip
    m = build.model(source, METHODS["lora"](build.outline(source), rank=4), ONE)
    plain = build.model(pretrained(path=source.path), METHODS["lora"](build.outline(source), rank=4), ONE)
    assert tree.size(m.layout) == tree.size(plain.layout)
    kernels = in_codes(m.layout)
    share = sum(map(tree.nbytes, kernels.values())) / sum(map(tree.size, kernels.values()))
    assert share == pytest.approx(quantised.bytes_per_parameter("nf4", 64, True), rel=1e-3)


def test_codes_come_back_from_a_checkpoint_and_take_no_more_bytes_there(tmp_path):
    kernels = jax.random.normal(jax.random.key(0), (2, 512, 1024))
    leaves = {"blocks": {"kernel": jax.jit(Storage("nf4").quantise)(kernels)}}
    keep = Checkpoints(tmp_path)
    keep.save(1, leaves, {}, {})
    keep.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), leaves)
    _, back, _, _ = keep.restore("last", like, {})
    keep.close()
    jax.tree.map(np.testing.assert_array_equal, back, leaves)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 0.53 * kernels.size


def test_some_kernels_are_kept_in_other_ways(folder_of):
    _, params = made(folder_of("llama2"), quantise_except=("mlp/down=int8", "attn/.*=none", "q=int4"))
    kinds = {name.removeprefix("blocks/0-2/"): leaf.kind for name, leaf in in_codes(params).items()}
    assert kinds == {"mlp/down/kernel": "int8", "mlp/gate/kernel": "nf4", "mlp/up/kernel": "nf4"}


def test_what_cannot_be_kept_so_is_refused_before_anything_is_read(folder_of):
    folder = folder_of("llama2")
    for settings, said in [
        (dict(quantise="fp4"), r"model\.quantise='fp4' is not one of int8, int4, nf4"),
        (dict(block=64), r"model\.quantise='nf4', blocks.*/attn/k/kernel: A kernel with 32 inputs.*blocks of 32"),
        (dict(quantise_except=("down",)), r"'down' is not target=kind"),
        (dict(quantise_except=("downn=int8",)), r"'downn' names none of attn/"),
        (dict(quantise="", quantise_except=("down=int8",)), r"model\.quantise, which is not set"),
        (dict(quantise="", settings={"init": "loftq"}), r"nothing is quantised\. Set model\.quantise"),
        (dict(method="full"), r"do not learn, and there is none"),
    ]:
        with pytest.raises(ValueError, match=said):
            made(folder, **settings)
