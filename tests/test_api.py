"""From Python: load, look, generate, score, export, and go on; against transformers and peft."""

import dataclasses

import jax
import numpy as np
import pytest

import tuning
from tests import checkpoints, runs
from tuning.core import config as configs
from tuning.core import mesh, tree


@pytest.fixture(scope="module")
def model(home):
    return tuning.load(home / "model")


@pytest.fixture(scope="module")
def lora_run(home, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "run"
    tuning.train(runs.config(home), path)
    return path


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want).max())))


def torch_logits(module, ids, mask=None):
    import torch

    with torch.no_grad():
        return module(torch.as_tensor(ids), attention_mask=None if mask is None else torch.as_tensor(mask)).logits.numpy()


def test_logits_and_scores_are_those_of_transformers(model, home):
    import torch

    theirs = checkpoints.reference(home / "model")
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (2, 20))
    close(np.asarray(model.logits(ids)), torch_logits(theirs, ids))
    mask = np.ones_like(ids)
    mask[0, :7] = 0  # padded on the left
    close(np.asarray(model.logits(ids, mask))[0, 7:], torch_logits(theirs, ids[:1, 7:])[0])
    texts = ["the red cat sees one dog", "two birds"]
    for text, score in zip(texts, model.score(texts), strict=True):
        one = torch.as_tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert score == pytest.approx(float(theirs(one, labels=one).loss), rel=1e-5)


def test_generation_is_that_of_transformers(model, home):
    import torch

    theirs = checkpoints.reference(home / "model")
    prompt = "the red cat"
    ids = torch.as_tensor([model.tokenizer(prompt)["input_ids"]])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=1)[0, ids.shape[1] :]
    assert model.generate([prompt, "one two three four"], max_new_tokens=12)[0] == model.tokenizer.decode(
        expected, skip_special_tokens=True
    )
    assert model.generate(prompt, max_new_tokens=8, temperature=1.0, seed=1) == model.generate(prompt, 8, 1.0, seed=1)


def test_a_model_without_a_tokenizer_loads_and_only_text_raises(tmp_path):
    bare = tuning.load(checkpoints.tiny("llama2", tmp_path))
    assert bare.logits([[3, 4, 5]]).shape == (1, 3, 100)
    with pytest.raises(ValueError, match="has no tokenizer files; this call takes text"):
        bare.generate("hello")
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.score(["hello there"])


def test_a_model_on_a_mesh_is_the_same_model(model, home):
    sharded = tuning.load(home / "model", mesh=mesh.mesh(data=1, fsdp=4, tensor=2))
    assert len(sharded.params["blocks"]["0-1"]["attn"]["q"]["kernel"].addressable_shards) == 8
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (2, 20))
    np.testing.assert_allclose(sharded.logits(ids), model.logits(ids), atol=2e-5)
    assert sharded.generate("the red", max_new_tokens=5) == model.generate("the red", max_new_tokens=5)


def test_shapes_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match=r"takes \[B, T\]"):
        model.logits([1, 2, 3])
    with pytest.raises(ValueError, match="fewer than two tokens"):
        model.score([""])


def test_an_exported_adapter_gives_the_same_logits_in_peft(lora_run, home, tmp_path):
    import peft

    ours = tuning.load(lora_run)
    base = tuning.load(home / "model")
    ours.export(tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(checkpoints.reference(home / "model"), tmp_path / "peft").eval()
    ids = np.random.default_rng(0).integers(2, ours.config.vocab_size, (2, 20))
    want = torch_logits(theirs, ids)
    close(np.asarray(ours.logits(ids)), want)
    close(np.asarray(tuning.load(home / "model", adapter=tmp_path / "peft").logits(ids)), want)
    assert float(np.abs(np.asarray(base.logits(ids)) - want).max()) > 1e-3


def test_a_merged_export_gives_the_same_logits_in_transformers(lora_run, home, tmp_path):
    ours = tuning.load(lora_run)
    with pytest.raises(ValueError, match="holds no adapter: add --merge"):
        ours.export(tmp_path / "hf")
    ours.export(tmp_path / "hf", merge=True)
    ids = np.random.default_rng(0).integers(2, ours.config.vocab_size, (2, 20))
    close(np.asarray(ours.logits(ids)), torch_logits(checkpoints.reference(tmp_path / "hf"), ids))


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "partial", "last_layers": 1}], ids=["full", "partial"])
def test_a_tuned_model_is_exported_whole(home, tmp_path, method):
    tuning.train(runs.config(home, method=method, train__steps=3), tmp_path / "run")
    ours = tuning.load(tmp_path / "run")
    ours.export(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(2, ours.config.vocab_size, (2, 20))
    close(np.asarray(ours.logits(ids)), torch_logits(checkpoints.reference(tmp_path / "hf"), ids))
    said = "partial tuning of norms in all layers" if method["name"] == "partial" else "no adapter of method"
    with pytest.raises(ValueError, match=f"PEFT has {said}"):
        ours.export(tmp_path / "peft", format="peft")


def test_a_run_without_evaluation_is_loaded_from_its_last_checkpoint(home, tmp_path):
    config = runs.config(home, train__steps=3)
    del config["data"]["eval"]
    final = tuning.train(config, tmp_path / "run")
    assert "eval/loss" not in final and final["train/loss"] > 0
    assert tuning.load(tmp_path / "run").logits([[2, 3]]).shape == (1, 2, tuning.load(home / "model").config.vocab_size)


def test_training_goes_on_from_a_peft_directory(lora_run, home, tmp_path):
    tuning.load(lora_run).export(tmp_path / "peft", format="peft")
    before = tuning.load(lora_run)
    config = runs.config(home, model__adapter=str(tmp_path / "peft"))
    with pytest.raises(ValueError, match=r"made by another method.*--config\.method\.rank=4"):
        tuning.train({**config, "method": {"name": "lora", "rank": 8}}, tmp_path / "other")
    lines = []
    tuning.train(config, tmp_path / "run")
    from tuning.training import writer

    lines = writer.read(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["step"] == 0
    assert lines[0]["eval/loss"] == pytest.approx(writer.read(lora_run / "metrics.jsonl")[-1]["eval/loss"], rel=1e-5)
    assert before.method["rank"] == 4


def test_added_tokens_are_resized_tuned_and_exported(home, tmp_path):
    import peft

    config = runs.config(home, model__added_tokens=("<|new|>", "<|other|>"), mesh={"data": 1, "fsdp": 4, "tensor": 2})
    tuning.train(config, tmp_path / "run")
    ours = tuning.load(tmp_path / "run")
    assert ours.tokenizer("<|new|>")["input_ids"] == [ours.config.vocab_size]
    rows = np.asarray(ours.params["embed"]["added"])
    assert rows.shape == (2, 32) and ours.config.vocabulary == ours.config.vocab_size + 2
    ids = np.random.default_rng(0).integers(2, ours.config.vocabulary, (2, 20))
    ours.export(tmp_path / "hf", merge=True)
    ours.export(tmp_path / "peft", format="peft")
    want = torch_logits(checkpoints.reference(tmp_path / "hf"), ids)
    close(np.asarray(ours.logits(ids)), want)
    base = checkpoints.reference(home / "model")
    base.resize_token_embeddings(ours.config.vocabulary)
    close(torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval(), ids), want)
    assert tuning.load(tmp_path / "hf").tokenizer("<|other|>")["input_ids"] == [ours.config.vocab_size + 1]


@pytest.mark.parametrize("change", ["accumulate", "pack", "devices"])
def test_the_first_losses_do_not_depend_on_how_the_batch_is_laid_out(home, tmp_path, change):
    """One epoch of the same examples in one batch, cut into microbatches, packed or padded, on one or eight devices."""
    from tuning.training import writer

    base = runs.config(home, method__dropout=0.0, train={"steps": 3, "batch_size": 64, "log_every": 1}, data__train__pack=False)
    base["data"]["train"]["split"] = "train[:48]"
    base["data"]["train"]["length"] = 64
    other = {
        "accumulate": {"train.accumulate": 8},
        "pack": {"data.train.pack": True},
        "devices": {"mesh.fsdp": 2, "mesh.tensor": 4},
    }[change]
    if change == "pack":  # both batches hold the whole data set once
        base["train"]["batch_size"] = 48
        other["train.batch_size"] = packed_rows(home, base)
        base["mesh"] = {"data": 1, "tensor": 8}
    losses = []
    for name, config in (("a", base), ("b", configs.override({}, base, other))):
        tuning.train(config, tmp_path / name)
        losses.append([line["train/loss"] for line in writer.read(tmp_path / name / "metrics.jsonl") if "train/loss" in line])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def packed_rows(home, config):
    from tuning import build

    return len(build.parts(configs.override({}, config, {"data.train.pack": True})).train)


def test_tuning_is_light_to_import():
    import subprocess
    import sys

    program = "import sys, tuning\nassert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=runs.environment(), cwd=runs.ROOT)


def test_bfloat16_keeps_masters_in_float32_and_frozen_weights_in_bfloat16(home, tmp_path):
    from tuning import build

    m = build.parts(runs.config(home, model__dtype="bfloat16")).model
    kinds = {(m.tuned(name), str(leaf.dtype)) for name, leaf in tree.flatten(m.layout).items()}
    assert kinds == {(True, "float32"), (False, "bfloat16")}
    final = tuning.train(runs.config(home, model__dtype="bfloat16", train__steps=3), tmp_path / "run")
    assert np.isfinite(final["eval/loss"])
    loaded = tuning.load(tmp_path / "run", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert dataclasses.is_dataclass(loaded.config)
