"""Tasks from beginning to end: texts and words are classified, pairs learned, by models of every shape; and they go out as they are."""

import json
import random

import numpy as np
import pytest

import tuning
from tests import checkpoints, words
from tuning.api import evaluate

torch = pytest.importorskip("torch")

GOOD, BAD = ("bright", "warm", "clever", "moving"), ("dull", "cold", "silly", "empty")
NEUTRAL = ("the", "film", "story", "and", "its", "music", "is", "an", "actor")
RNG = random.Random(0)


def sentence():
    """(words, whether each praises, whether the sentence does)."""
    praised = RNG.random() < 0.5
    some = [RNG.choice(GOOD if praised else BAD) if RNG.random() < 0.4 else RNG.choice(NEUTRAL) for _ in range(RNG.randint(3, 8))]
    some[RNG.randrange(len(some))] = RNG.choice(GOOD if praised else BAD)
    return some, [word in GOOD for word in some], praised


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny models with tokenizers, and data for three tasks."""
    path = tmp_path_factory.mktemp("tasks")
    for name, count in (("train", 256), ("eval", 64)):
        made = [sentence() for _ in range(count)]
        lines = "".join(f"{' '.join(some)}\t{int(praised)}\n" for some, _, praised in made)
        (path / f"{name}.tsv").write_text(lines)
        write(
            path / f"{name}_tags.jsonl", [{"tokens": some, "tags": ["praise" if t else "none" for t in marks]} for some, marks, _ in made]
        )
        write(path / f"{name}_pairs.jsonl", [{"mr": " ".join(some[:3]), "ref": " ".join(reversed(some[:3]))} for some, _, _ in made])
    texts = [" ".join([*GOOD, *BAD, *NEUTRAL])] * 4
    for family, train in (("bert_masked", words.bert), ("llama2", words.gpt), ("t5", words.t5)):
        tokenizer = train(texts)
        sizes = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
        checkpoints.tiny(family, path / family, **sizes)
        tokenizer.save_pretrained(path / family)
    return path


def config(home, family, method="full", objective="labels", **sections):
    made = {
        "model": {"path": str(home / family)},
        "method": {"name": method},
        "objective": {"name": objective},
        "optimizer": {"learning_rate": 3e-3},
        "mesh": {"data": 4, "fsdp": 2},
        "train": {"steps": 40, "batch_size": 16},
        "eval": {"every": 40, "batch_size": 16},
    }
    return {name: {**made.get(name, {}), **sections.get(name, {})} for name in {**made, **sections}}


def data(home, kind, format, columns=(), **more):
    shared = dict(length=24, columns=columns, **more)
    return {"train": {"path": str(home / f"train{kind}"), "format": format, **shared}, "eval": {"path": str(home / f"eval{kind}")}}


@pytest.mark.parametrize(("family", "method"), [("bert_masked", "full"), ("llama2", "lora")])
def test_a_classifier_of_texts_learns_and_says_the_same_in_transformers(home, tmp_path, family, method):
    c = config(
        home, family, method, model={"path": str(home / family), "head": "sequence_classification", "classes": ("bad", "good")},
        data=data(home, ".tsv", {"name": "labels"}, columns=("text", "label")),
    )  # fmt: skip
    final = tuning.train(c, tmp_path / "run")
    assert final["eval/accuracy"] > 0.9 and final["eval/f1"] > 0.9
    model = tuning.load(tmp_path / "run")
    said = model.classify(["the film is warm and clever", "an empty story"])
    assert said[0]["good"] > 0.5 > said[1]["good"] and sum(said[0].values()) == pytest.approx(1)
    assert evaluate(model, c)["accuracy"] == pytest.approx(final["best/eval/loss"] and final["eval/accuracy"], abs=0.1)
    out = model.export(tmp_path / "out", merge=True)
    theirs = checkpoints.reference(out, "SequenceClassification")
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    ids = np.array([model.tokenizer("the film is warm")["input_ids"]])
    with torch.no_grad():
        np.testing.assert_allclose(model.logits(ids), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-5)
    assert "f1" in (out / "README.md").read_text()
    again = tuning.load(out)
    assert again.classify("an empty story")[0] == pytest.approx(said[1], abs=1e-5)


@pytest.mark.parametrize("family", ["bert_masked", "llama2"])
def test_a_tagger_of_words_learns_and_says_the_same_in_transformers(home, tmp_path, family):
    c = config(
        home, family, model={"path": str(home / family), "head": "token_classification", "classes": ("none", "praise")},
        data=data(home, "_tags.jsonl", {"name": "tags", "at": "last"}),
    )  # fmt: skip
    final = tuning.train(c, tmp_path / "run")
    assert final["eval/accuracy"] > 0.95 and final["eval/f1"] > 0.9
    model = tuning.load(tmp_path / "run")
    theirs = checkpoints.reference(model.export(tmp_path / "out"), "TokenClassification")
    ids = np.array([model.tokenizer("the film is warm")["input_ids"]])
    with torch.no_grad():
        np.testing.assert_allclose(model.logits(ids), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-5)


@pytest.mark.parametrize(("family", "method"), [("t5", "full"), ("t5", "lora"), ("llama2", "full")])
def test_pairs_are_learned_by_decoders_and_by_encoder_decoders(home, tmp_path, family, method):
    format = {"name": "pairs", "prompt": "mr", "completion": "ref" if family == "t5" else " {ref}"}
    c = config(home, family, method, objective="next_token", data=data(home, "_pairs.jsonl", format), optimizer={"learning_rate": 1e-2})
    c["train"]["steps"] = 60
    final = tuning.train(c, tmp_path / "run")
    model = tuning.load(tmp_path / "run", checkpoint="last")
    untuned = evaluate(tuning.load(home / family), c)
    assert final["eval/loss"] < untuned["loss"] - 1
    out = model.export(tmp_path / "out", merge=True)
    theirs = checkpoints.reference(out, "Seq2SeqLM" if family == "t5" else "CausalLM")
    prompt = "the film is"
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    said = theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, 1 if family == "t5" else ids.shape[1] :]
    assert model.generate(prompt, max_new_tokens=8) == [model.tokenizer.decode(said, skip_special_tokens=True)]


@pytest.mark.parametrize(("cell", "method"), [("gru", "full"), ("lstm", "lora")])
def test_a_recurrent_network_learns_too_and_comes_back(home, tmp_path, cell, method):
    model = dict(name="recurrent", tokenizer=str(home / "llama2"), cell=cell, width=32, hidden=32, layers=1)
    c = config(home, "", method, model={**model, "bidirectional": cell == "gru", "classes": ("bad", "good")},
               data=data(home, ".tsv", {"name": "labels"}, columns=("text", "label")), optimizer={"learning_rate": 3e-2})  # fmt: skip
    del c["model"]["path"]
    with pytest.raises(ValueError, match=r"mesh.context=2 splits sequences, and a recurrent network"):
        tuning.train({**c, "mesh": {"data": -1, "context": 2}}, tmp_path / "split")
    assert tuning.train(c, tmp_path / "run")["eval/accuracy"] > 0.9
    model = tuning.load(tmp_path / "run")
    again = tuning.load(model.export(tmp_path / "out", merge=True))
    for text in ("the film is warm", "an empty story"):
        assert again.classify(text)[0] == pytest.approx(model.classify(text)[0], abs=1e-5)


def test_a_head_and_an_objective_that_do_not_fit_are_refused(home, tmp_path):
    classes = {"path": str(home / "bert_masked"), "head": "sequence_classification", "classes": ("bad", "good")}
    with pytest.raises(ValueError, match=r"objective.name=labels"):
        tuning.train(config(home, "bert_masked", objective="next_token", model=classes, data={}), tmp_path / "a")
    with pytest.raises(ValueError, match=r"needs model.classes"):
        tuning.train(config(home, "bert_masked", model={**classes, "classes": ()}, data={}), tmp_path / "b")
    with pytest.raises(ValueError, match=r"head='sequence_clasification' is not one of.*Did you mean"):
        tuning.train(config(home, "bert_masked", model={**classes, "head": "sequence_clasification"}, data={}), tmp_path / "c")
