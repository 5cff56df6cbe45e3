"""PEFT's LN_TUNING directories, which are our partial tuning of norms: both ways, against peft itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tuning
from tests import checkpoints
from tests.hub.test_hub_peft_methods import close, decoded, held, loaded, made, peft_logits, reference
from tuning import build, export, weights
from tuning.core import mesh, tree
from tuning.hub import files
from tuning.loaded import LoadedModel
from tuning.methods import METHODS
from tuning.source import pretrained

peft = pytest.importorskip("peft")

# What a user of peft would name.
TARGETS = {
    "llama2": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "bert_masked": r".*(output|embeddings)\.LayerNorm",
    "t5": ["layer_norm", "final_layer_norm"],
}
TASK = {"t5": "SEQ_2_SEQ_LM", "bert_masked": "FEATURE_EXTRACTION"}
NORMS = dict(name="partial", parts=("norms",))


def logits(model, family, tokens):
    return np.asarray(model.logits(tokens, decoder_tokens_BT=decoded(tokens) if family == "t5" else None))


def learned(folder, method=NORMS, **source):
    """(model, parameters) with random values where the method tunes."""
    with jax.set_mesh(mesh.over(jax.devices()[:1])):
        s = pretrained(path=str(folder), **source)
        m = build.model(
            s, METHODS["partial"](build.outline(s), **{k: v for k, v in method.items() if k != "name"}), jax.sharding.get_mesh()
        )
        rng = np.random.default_rng(3)
        fill = lambda name, x: jnp.asarray(rng.normal(size=x.shape) * 0.3 + 1, x.dtype) if m.tuned(name) else x  # noqa: E731
        return m, tree.map_named(fill, weights.base_params(m, lambda name: True, 0))


@pytest.mark.parametrize("family", TARGETS)
def test_norms_that_learned_here_are_the_same_in_peft(family, tmp_path, checkpoint_of):
    base, tokens = checkpoint_of(family), checkpoints.tokens(2, 9)
    m, params = learned(base)
    export.write(m, params, NORMS, tmp_path, "peft", merge=False)
    theirs = loaded(reference(base, family), tmp_path)
    mine = logits(LoadedModel(m, params, ()), family, tokens)
    close(mine, peft_logits(theirs, tokens))
    close(mine, peft_logits(theirs.merge_and_unload(), tokens))
    assert np.abs(mine - peft_logits(reference(base, family), tokens)).max() > 0.01


@pytest.mark.parametrize("family", TARGETS)
def test_norms_that_peft_tuned_are_read_and_written_again_the_same(family, tmp_path, checkpoint_of):
    base, tokens = checkpoint_of(family), checkpoints.tokens(2, 9)
    theirs = made(
        reference(base, family), "LNTuning", {"target_modules": TARGETS[family], "task_type": TASK.get(family)}, tmp_path / "theirs"
    )
    ours = tuning.load(base, adapter=tmp_path / "theirs")
    close(logits(ours, family, tokens), peft_logits(theirs, tokens))
    ours.export(tmp_path / "ours", format="peft")
    want, have = held(tmp_path / "theirs"), held(tmp_path / "ours")
    assert want.keys() == have.keys() and all(np.array_equal(want[name], have[name]) for name in want)


def test_a_new_head_travels_with_the_norms(tmp_path, checkpoint_of):
    base, tokens = checkpoint_of("llama2"), checkpoints.tokens(2, 9)
    m, params = learned(base, head="sequence_classification", classes=("a", "b", "c"))
    export.write(m, params, NORMS, tmp_path, "peft", merge=False)
    model = checkpoints._auto("SequenceClassification").from_pretrained(base, num_labels=3, attn_implementation="eager")
    close(np.asarray(LoadedModel(m, params, ()).logits(tokens)), peft_logits(loaded(model, tmp_path), tokens))
    read = tree.flatten(tuning.load(base, adapter=tmp_path).params)
    assert all(np.array_equal(read[name], value) for name, value in tree.flatten(params).items())


def test_what_learned_beside_the_norms_is_saved_with_them(tmp_path, checkpoint_of):
    base, tokens = checkpoint_of("llama2"), checkpoints.tokens(2, 9)
    method = dict(name="partial", leaves="^head/|norm/scale$")
    m, params = learned(base, method)
    export.write(m, params, method, tmp_path, "peft", merge=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    close(np.asarray(LoadedModel(m, params, ()).logits(tokens)), peft_logits(loaded(reference(base, "llama2"), tmp_path), tokens))
    read = tree.flatten(tuning.load(base, adapter=tmp_path).params)
    assert all(np.array_equal(read[name], value) for name, value in tree.flatten(params).items())


def test_partial_tuning_without_a_norm_is_none_of_pefts(tmp_path, checkpoint_of):
    method = dict(name="partial", leaves="^head/")
    with pytest.raises(ValueError, match="here no norm learned"):
        export.write(*learned(checkpoint_of("llama2"), method), method, tmp_path, "peft", merge=False)


@pytest.mark.parametrize(("change", "said"), [
    (lambda c, v: ({**c, "target_modules": ["input_layernorm"]}, v), "layernorm.weight is in the file, and not named by it"),
    (lambda c, v: (c, {n: x for n, x in v.items() if "layers.1.input" not in n}), "named by it, and not in the file"),
    (lambda c, v: (c, {**v, "base_model.model.model.norm.ln_tuning_layers.bias": np.zeros(32, np.float32)}), "no part of a LN_TUNING"),
])  # fmt: skip
def test_a_directory_that_says_one_thing_and_holds_another_is_refused(change, said, tmp_path, checkpoint_of):
    base = checkpoint_of("llama2")
    export.write(*learned(base), NORMS, tmp_path, "peft", merge=False)
    config, values = change(files.read_json(tmp_path / "adapter_config.json"), held(tmp_path))
    files.write_json(tmp_path / "adapter_config.json", config)
    (tmp_path / "adapter_model.safetensors").unlink()
    files.write(tmp_path, values.items(), stem="adapter_model")
    with pytest.raises(ValueError, match=said):
        tuning.load(base, adapter=tmp_path)


def test_the_base_is_not_taken_for_what_the_norms_made_of_it(tmp_path, checkpoint_of):
    base = checkpoint_of("llama2")
    export.write(*learned(base), NORMS, tmp_path, "peft", merge=False)
    model = tuning.load(base, adapter=tmp_path)
    with pytest.raises(ValueError, match="Load the base alone, and add the adapter to that"):
        model.add("other", tmp_path)
    model, tokens = tuning.load(base), checkpoints.tokens(2, 9)
    plain = np.asarray(model.logits(tokens))
    model.add("norms", tmp_path)
    model.use("norms")
    assert np.abs(np.asarray(model.logits(tokens)) - plain).max() > 0.01
    model.use(None)
    assert np.array_equal(model.logits(tokens), plain)


def test_training_goes_on_from_pefts_norms(tmp_path, checkpoint_of):
    base = checkpoint_of("llama2")
    _, params = learned(base)
    export.write(*learned(base), NORMS, tmp_path, "peft", merge=False)
    begun = lambda method: weights.start_params(learned(base, method, adapter=str(tmp_path))[0], 0)  # noqa: E731
    assert all(np.array_equal(x, tree.flatten(params)[n]) for n, x in tree.flatten(begun(NORMS)).items())
