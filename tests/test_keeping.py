"""Keeping what the model knew: the base inside the step, rehearsed text, and what both texts lost, before and after."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tuning
from tests import checkpoints, hlo, runs, tiny, words
from tests.test_train import Crash, crash_at
from tuning import api, build, weights
from tuning.__main__ import main
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch, Inputs, TrainState
from tuning.methods import METHODS
from tuning.methods.method import added
from tuning.models import network
from tuning.nn.sites import NOTHING
from tuning.objectives import OBJECTIVES
from tuning.source import pretrained
from tuning.training import flops, state, step, writer

# Examples that share a row, by their lengths.
LENGTHS = ((5, 9), (7, 4), (11,), (3, 3, 3), (14,), (2, 8), (6, 6), (9, 2))
T, WEIGHT = 32, 0.7
SETTINGS = {"lora": {"rank": 4}, "prompt": {"length": 4}, "prefix": {"length": 4}}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    @functools.cache
    def folder_of(family):
        folder = checkpoints.tiny(family, tmp_path_factory.mktemp(family))
        words.bert(["what the tokenizer reads does not count"], 100).save_pretrained(folder)
        return str(folder)

    return lambda family, dropout: pretrained(path=folder_of(family), dropout=dropout)


def side(slots):
    """(tokens, segments, positions) of the examples, with so many free positions before each; the same text for any number of them."""
    rng = np.random.default_rng(0)
    tokens, segments, positions = np.zeros((3, len(LENGTHS), T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, 1):
            end = at + slots + length
            tokens[row, at + slots : end] = rng.integers(3, 100, length)
            segments[row, at:end], positions[row, at:end] = number, np.arange(slots + length)
            at = end
    return tokens, segments, positions


def batch_of(source, slots):
    """Each token but the last is learned or, if the first stands for the whole, a class there."""
    inputs = None
    if source.config.reads == "encoder_decoder":
        tokens, segments, positions = side(slots)
        inputs, slots = Inputs(tokens, segments, positions), 0
    tokens, segments, positions = side(slots)
    same = (segments > 0) & (segments == np.pad(segments, ((0, 0), (0, 1)))[:, 1:])
    learned = same & (positions >= slots)
    targets = np.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
    if source.config.head.output == "classes":
        learned, targets = (segments > 0) & (positions == 0), tokens % len(source.config.head.classes)
    return Batch(tokens, targets, learned.astype(np.float32), segments, positions, None, inputs)


def made(source, name, where):
    """(model, parameters to start from, the same with an adapter that has moved)."""
    m = build.model(source, METHODS[name](build.outline(source), **SETTINGS[name]), where)
    start = weights.start_params(m, 0)
    keys = jax.random.split(jax.random.key(1), len(tree.flatten(start)))
    move = dict(zip(tree.flatten(start), keys, strict=True))
    shift = lambda n, x: x + jax.device_put(0.1 * jax.random.normal(move[n], x.shape), x.sharding) if added(n) else x  # noqa: E731
    return m, start, tree.map_named(shift, start)


def logits_of(apply, params, batch):
    @jax.jit
    def run(params, batch):
        hidden, head, _ = apply(params, batch)
        return head(hidden)

    return run(params, batch)


def alone(source):
    """(apply, parameters) of the published model."""
    where = meshes.over(jax.devices()[:1])
    plain = build.model(source, METHODS["full"](build.outline(source)), where)
    return network.build(source.config.construct(NOTHING)).apply, weights.base_params(plain, lambda _: True, 0)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "prompt"), ("t5", "prompt"), ("bert_classes", "prompt"), ("gpt2", "prefix")])
def test_the_base_says_what_it_says_of_the_examples_alone(source_of, family, name):
    source = source_of(family, 0.5)
    m, _, params = made(source, name, meshes.over(jax.devices()[:1]))
    slots = m.method.slots
    slotted, bare = batch_of(source, slots), batch_of(source, 0)
    want = np.asarray(logits_of(*alone(source), bare))
    base = lambda params, batch: build.base(m)(params, batch, jax.random.key(0))  # noqa: E731
    got, tuned = (np.asarray(logits_of(apply, params, slotted)) for apply in (base, m.network.apply))
    there = slotted.weights > 0  # the learned targets come in the same order with and without free positions
    assert there.sum() == (bare.weights > 0).sum()
    np.testing.assert_allclose(got[there], want[bare.weights > 0], atol=1e-5 * max(1, np.abs(want).max()))
    assert np.abs(tuned[there] - got[there]).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [("llama3", "lora", {"fsdp": 2, "tensor": 2}), ("t5", "lora", {}), ("gpt2", "prompt", {"fsdp": 2, "tensor": 2})],
)
def test_a_steps_value_and_gradient_are_those_of_the_formula(source_of, family, name, sizes):
    source = source_of(family, 0.0)
    where = meshes.over(jax.devices()[: math.prod(sizes.values())], **sizes)
    with jax.set_mesh(where):
        m, start, params = made(source, name, where)
        batch = jax.device_put(batch_of(source, m.method.slots), meshes.rows(where))
        transform = optax.sgd(1.0)
        made_step = step.train_step(
            m.network.apply, OBJECTIVES["next_token"](base_kl=WEIGHT), transform, accumulate=1, clip_norm=0.0, seed=0, base=build.base(m)
        )
        compiled = jax.jit(made_step)
        now = state.start(params, m.tuned, transform, where)
        after, means = compiled(now, batch)
        _, first = compiled(TrainState(now.step, tree.split(start, m.tuned)[0], now.frozen, now.optimizer), batch)

    plain_apply, base = alone(source)
    bare, slotted = batch_of(source, 0), batch_of(source, m.method.slots)
    there = np.flatnonzero(slotted.weights.reshape(-1)), np.flatnonzero(bare.weights.reshape(-1))
    before = logits_of(plain_apply, base, bare).reshape(-1, 100)[there[1]]
    targets = jnp.asarray(bare.targets.reshape(-1)[there[1]])
    tuned, frozen = tree.split(jax.tree.map(np.asarray, params), m.tuned)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(tuned):
        hidden, head, _ = m.network.apply(tree.merge(tuned, frozen), slotted)
        log_q = jax.nn.log_softmax(head(hidden).reshape(-1, 100)[there[0]])
        p, log_p = jax.nn.softmax(before), jax.nn.log_softmax(before)
        nll, kl = -jnp.take_along_axis(log_q, targets[:, None], 1).mean(), (p * (log_p - log_q)).sum(-1).mean()
        return nll + WEIGHT * kl, kl

    (value, kl), grads = expected(tuned)
    assert float(kl) > 0.01 and float(means["base_kl"].value) == pytest.approx(float(kl), rel=1e-5)
    assert float(means["loss"].value) == pytest.approx(float(value), rel=1e-6)
    moved = tree.flatten(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), now.tuned, after.tuned))
    for n, want in tree.flatten(grads).items():
        np.testing.assert_allclose(moved[n], want, atol=1e-5 * max(1, float(jnp.abs(want).max())), err_msg=n)
    if name == "lora":
        assert abs(float(first["base_kl"].value)) < 1e-6 and float(first["nll"].value) == pytest.approx(float(first["loss"].value))


def test_a_step_costs_one_forward_pass_of_the_base_more_and_no_gradient_of_it():
    wide = tiny.CONFIG.replace(vocab_size=256, width=128, heads=4, head_dim=32, hidden=256)
    chosen = METHODS["lora"](tiny.outline(wide), rank=4)
    net, plain, transform = tiny.build(wide, chosen.sites), tiny.build(wide), optax.sgd(1.0)
    learns, rests = tree.split(net.abstract, chosen.tuned)
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), learns, rests, jax.eval_shape(transform.init, learns))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(4, 64, 256))
    one_step = functools.partial(step.train_step, net.apply, transform=transform, accumulate=1, clip_norm=0.0, seed=0)
    counted = [
        hlo.dot_flops(jax.jit(one_step(loss, base=base)).lower(abstract, batch).compile().as_text()) / (4 * 64)
        for loss, base in ((OBJECTIVES["next_token"](), None), (OBJECTIVES["next_token"](base_kl=1.0), plain.apply))
    ]
    forward = flops.flops_per_token(
        {n: x.shape for n, x in tree.flatten(plain.abstract).items()}, lambda name: False, wide.attention_flops(64)
    )
    assert 0.95 * forward <= counted[1] - counted[0] <= 1.15 * forward


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """What the model knew: {"replay": path, "kept": path}, of running text."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, count in (("replay", 30), ("kept", 12)):
        lines = [{"text": " ".join(rng.choice(runs.WORDS, 12))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(folder / f"{name}.jsonl") for name in ("replay", "kept")}


def config(home, texts, base_kl, **changes):
    """A run with all of it; the learning rate is high, so that the model goes away from its base."""
    made = runs.config(home, objective={"base_kl": base_kl}, optimizer__learning_rate=3e-2, **changes)
    made["data"] |= {"replay": {"path": texts["replay"], "share": 0.25}, "kept": {"path": texts["kept"]}}
    return made


@pytest.fixture(scope="module")
def straight(home, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("straight") / "run"
    return path, tuning.train(config(home, texts, 1e-6), path)


def test_a_run_says_what_both_texts_lost_before_and_after(straight):
    path, final = straight
    lines = [line for line in writer.read(path / "metrics.jsonl") if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert {"kept/loss", "kept/nll", "kept/perplexity", "kept/accuracy", "kept/base_kl"} <= set(lines[0])
    for name in ("eval/loss", "kept/loss", "eval/nll", "kept/nll"):
        assert final[f"before/{name}"] == lines[0][name] and final[name] == lines[2][name] != lines[0][name]
    assert lines[0]["kept/loss"] != lines[0]["eval/loss"] and abs(lines[0]["kept/base_kl"]) < 1e-6 < 1e-2 < lines[2]["kept/base_kl"]
    assert set(json.loads((path / "provenance.json").read_text())["data"]) == {"train", "replay", "eval", "kept"}


def test_a_run_that_was_killed_remembers_its_base_and_its_place_in_both_texts(home, texts, straight, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        crash_at(5, patch)
        with pytest.raises(Crash):
            tuning.train(config(home, texts, 1e-6), tmp_path / "run")
    capsys.readouterr()
    final = tuning.train(config(home, texts, 1e-6), tmp_path / "run")
    assert writer.comparable(tmp_path / "run" / "metrics.jsonl") == writer.comparable(straight[0] / "metrics.jsonl")
    said = capsys.readouterr().out
    assert "Going on from step 4" in said and "train data, 75.0% of the rows: 60 examples" in said
    assert "replay data, 25.0% of the rows: 30 examples" in said and "kept data: 12 examples" in said
    for name in ("eval", "kept"):
        assert f"{name} loss {straight[1][f'before/{name}/loss']:.4f} before, {final[f'{name}/loss']:.4f} after" in said


def test_a_large_weight_keeps_the_model_at_its_base(home, texts, straight, tmp_path):
    held = tuning.train(config(home, texts, 300.0, train__steps=40, eval={"every": 0}), tmp_path / "run")
    for name in ("eval", "kept"):
        assert 0 < held[f"{name}/base_kl"] < 0.05 * straight[1][f"{name}/base_kl"]
        assert abs(held[f"{name}/nll"] - held[f"before/{name}/nll"]) < 0.1


def test_the_base_is_measured_on_the_same_data(home, texts, straight, tmp_path, capsys):
    path, final = straight
    for split in ("eval", "kept"):
        assert main(["evaluate", f"--model={path}", "--checkpoint=last", f"--split={split}", "--base"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["base/nll"] == pytest.approx(final[f"before/{split}/loss"], rel=1e-6)
        assert measured["loss"] == pytest.approx(final[f"{split}/loss"], rel=1e-6) and abs(measured["base/base_kl"]) < 1e-6
    with pytest.raises(ValueError, match="it is a base itself"):
        api.evaluate(tuning.load(home / "model"), runs.config(home), base=True)
    full = runs.config(home, method={"name": "full"}, train__steps=3)
    final = tuning.train(full, tmp_path / "full")
    measured = api.evaluate(tuning.load(tmp_path / "full"), full, base=True)
    assert measured["base/loss"] == pytest.approx(final["before/eval/loss"], rel=1e-6) and measured["loss"] < measured["base/loss"] - 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "full"}}, r"base_kl=0\.1 compares with the base, of which blocks/\S+, \S+ and \d+ more learn"),
        ({"model__added_tokens": ("<new>",)}, r"of which embed/added, head/added learn. Set it to 0, or"),
        ({"objective": {"base_kl": -1.0}}, r"base_kl=-1\.0 weighs a divergence"),
        ({"data__eval": {}}, r"data\.kept is evaluated along with data\.eval, which has no path"),
        ({"data__replay": {"share": 0.2}}, r"data\.replay\.share=0\.2, but of which text\? Set data\.replay\.path"),
        ({"data__replay__share": 1.0}, r"data\.replay\.share=1\.0 of the training rows must lie between 0 and 1"),
        ({"data__replay__length": 16}, r"Unknown config key data\.replay\.length"),
        ({"data__kept__length": 4096}, r"data\.kept\.length=4096 is more than the 128 positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(home, texts, changes, message):
    made = config(home, texts, 0.1)
    for key, value in changes.items():
        build.configs.put(made, key.replace("__", "."), value)
    with pytest.raises(ValueError, match=message):
        build.parts(made)


def test_a_run_does_not_go_on_with_another_share(home, texts, straight):
    made = config(home, texts, 1e-6)
    made["data"]["replay"]["share"] = 0.2
    with pytest.raises(ValueError, match=r"holds another run: data\.replay\.share: 0\.2 here, 0\.25 there"):
        tuning.train(made, straight[0])


def test_without_a_share_there_is_no_replay(home, texts):
    made = config(home, texts, 0.0)
    del made["data"]["replay"]["share"]
    with pytest.raises(ValueError, match=r"data\.replay\.share has no value"):
        build.parts(made)


def test_what_is_not_set_for_the_other_texts_comes_from_the_training_text(home, texts):
    made = config(home, texts, 0.0, data__train__pack=False, data__train__format={"name": "pairs"})
    made["data"]["replay"]["format"] = {"name": "text", "column": "text"}
    parts = build.parts(made)
    assert parts.config["data"]["replay"]["pack"] is parts.config["data"]["kept"]["pack"] is False
    assert parts.config["data"]["kept"]["format"]["name"] == "text" and parts.config["data"]["kept"]["length"] == 32
    assert parts.mixture is not None and len(parts.mixture) == 60 + 30 and parts.mixture.other.length == 32 and parts.base is None
