"""Published checkpoints through our network, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning.core import mesh, tree
from tuning.hub import checkpoint, files

torch = pytest.importorskip("torch")


def theirs(model, tokens, mask=None):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=None if mask is None else torch.tensor(mask)).logits.numpy()


def assert_same(ours, reference, mask=None):
    gap = np.abs(ours - reference)
    if mask is not None:
        gap = gap[mask > 0]
    assert gap.max() <= 1e-5 * max(1, np.abs(reference).max())


def test_the_llama3_rotation_is_not_the_plain_one(ours, checkpoint_of):
    tokens = checkpoints.tokens()
    scaled, plain = ours(checkpoint_of("llama3")), ours(checkpoint_of("llama3"), rope_scaling=None)
    assert np.abs(scaled.logits(tokens) - plain.logits(tokens)).max() > 1e-2


def test_bfloat16_round_trips_bit_for_bit(tmp_path, ours_of, ours):
    first = ours_of("qwen3")
    checkpoint.save(tmp_path / "one", first.params, first.config, original=first.raw, dtype="bfloat16")
    again = ours(tmp_path / "one")
    assert again.raw["dtype"] == "bfloat16"
    checkpoint.save(tmp_path / "two", again.params, again.config, original=again.raw, dtype="bfloat16")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert checkpoints.reference(tmp_path / "two") is not None


def test_a_mesh_of_eight_devices_holds_the_same_arrays(ours, checkpoint_of, ours_of):
    spread = ours(checkpoint_of("qwen2"), where=mesh.over(jax.devices(), fsdp=4, tensor=2))
    for name, leaf in tree.flatten(ours_of("qwen2").params).items():
        other = tree.flatten(spread.params)[name]
        assert np.array_equal(leaf, mesh.gather(other)), name
    kernel = spread.params["blocks"]["0-2"]["attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 8, 16)


def test_only_the_wanted_slices_are_read(monkeypatch, ours, checkpoint_of):
    sizes = []
    read = files.Tensors.read

    def spy(self, name, index=()):
        sizes.append(read(self, name, index).nbytes)
        return read(self, name, index)

    monkeypatch.setattr(files.Tensors, "read", spy)
    ours(checkpoint_of("llama2"), where=mesh.over(jax.devices(), fsdp=4, tensor=2))
    assert max(sizes) <= 100 * 32 * 4 // 8  # an eighth of the largest tensor
    total = sum(file.stat().st_size for file in checkpoint_of("llama2").glob("*.safetensors"))
    assert sum(sizes) < total  # and nothing twice


def test_a_cut_stack_reads_and_writes_the_same_checkpoint(tmp_path, ours, checkpoint_of, ours_of):
    cut = ours(checkpoint_of("llama2"), cuts=(1,))
    assert set(cut.params["blocks"]) == {"0-0", "1-2"}
    tokens = checkpoints.tokens(2, 12)
    assert_same(cut.logits(tokens), ours_of("llama2").logits(tokens))
    checkpoint.save(tmp_path, cut.params, cut.config, original=cut.raw)
    assert np.array_equal(ours(tmp_path).logits(tokens), ours_of("llama2").logits(tokens))


@pytest.mark.parametrize(("family", "first"), [("llama2", 100), ("llama2", 97), ("llama3", 100), ("bert_masked", 100)])
def test_rows_of_added_tokens_are_put_in_their_places(family, first, tmp_path, ours, checkpoint_of):
    net = ours(checkpoint_of(family), added=(first, 2))
    rng = np.random.default_rng(0)
    extra = tree.map_named(lambda name, leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), net.extra)
    params = tree.merge(net.params, extra)
    checkpoint.save(tmp_path, params, net.config, original=net.raw)
    tokens = checkpoints.tokens(2, 12)
    tokens[:, 3], tokens[:, 7] = first, first + 1
    model = checkpoints.reference(tmp_path, checkpoints.FAMILIES[family].get("auto", "CausalLM"))
    assert model.config.vocab_size == max(100, first + 2)
    assert_same(net.logits(tokens, params=params), theirs(model, tokens))


def rewrite(directory, tmp_path, change):
    """A copy of a checkpoint with its tensors changed."""
    tensors = files.Tensors(directory)
    values = {name: tensors.read(name) for name in tensors}
    change(values)
    files.write(tmp_path, values.items())
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    return tmp_path


def test_all_that_is_wrong_with_the_tensors_is_said_at_once(tmp_path, ours, checkpoint_of):
    def change(values):
        del values["model.norm.weight"]
        values["model.layers.3.mlp.up_proj.weight"] = values["model.layers.2.mlp.up_proj.weight"]
        values["model.layers.1.self_attn.k_proj.weight"] = values["model.layers.1.self_attn.k_proj.weight"].T

    with pytest.raises(
        ValueError, match=r"missing \(1\): model.norm.weight; unexpected \(1\): model.layers.3.mlp.up.*k_proj.weight \(32, 16\), exp"
    ):
        ours(rewrite(checkpoint_of("llama2"), tmp_path, change))


def test_a_stored_copy_of_a_tied_head_is_accepted_only_if_it_is_one(tmp_path, ours, checkpoint_of):
    def copy(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    def differ(values):
        values["lm_head.weight"] = values["model.embed_tokens.weight"] + 1

    ours(rewrite(checkpoint_of("llama3"), tmp_path / "copy", copy))
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head.weight differs"):
        ours(rewrite(checkpoint_of("llama3"), tmp_path / "differ", differ))


def test_quantised_weights_are_refused(tmp_path, ours, checkpoint_of):
    def change(values):
        values["model.layers.0.mlp.up_proj.weight"] = values["model.layers.0.mlp.up_proj.weight"].astype(np.int8)

    with pytest.raises(ValueError, match=r"quantised.*mlp.up_proj.*int8"):
        ours(rewrite(checkpoint_of("llama2"), tmp_path, change))


def test_what_cannot_be_exported_is_refused(tmp_path, ours_of, ours, checkpoint_of):
    net = ours_of("llama2")
    adapted = tree.merge(net.params, {"blocks": {"0-2": {"attn": {"q": {"adapter": {"a": jnp.zeros((3, 32, 2))}}}}}})
    with pytest.raises(ValueError, match="fold them first"):
        checkpoint.save(tmp_path, adapted, net.config)
    big = tree.map_named(lambda name, leaf: leaf * 1e6, net.params)
    with pytest.raises(ValueError, match="float16's largest"):
        checkpoint.save(tmp_path / "half", big, net.config, dtype="float16")
    with pytest.raises(ValueError, match="leaves a gap behind the 100 rows"):
        ours(checkpoint_of("llama2"), added=(105, 2))
    checkpoint.save(tmp_path / "good", net.params, net.config)
    with pytest.raises(ValueError, match="already has weights"):
        checkpoint.save(tmp_path / "good", net.params, net.config)


def test_adapters_are_not_looked_for_in_a_checkpoint(ours_of, checkpoint_of):
    abstract = {"embed": {"added": jax.ShapeDtypeStruct((2, 32), jnp.float32)}}
    with pytest.raises(ValueError, match="has no embed/added"):
        checkpoint.load(checkpoint_of("llama2"), abstract, abstract, lambda name: jnp.float32, ours_of("llama2").raw)
