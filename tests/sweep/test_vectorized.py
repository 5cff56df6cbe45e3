"""Many runs in one program: each is the run that it would have been alone."""

import functools
import json
import math
import re
import signal
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
import transformers

import tuning
from tests import checkpoints, runs
from tests.methods.test_methods import SETTINGS
from tuning import api, build, weights
from tuning.core import tree
from tuning.data import loader
from tuning.methods import METHODS
from tuning.sweep import vectorized
from tuning.sweep.vectorized import groups, train_many
from tuning.training import loop, many, state, step, writer
from tuning.training.guard import Interrupted

# Three runs that differ in all that may differ in one program; a rank that is less than another's is filled up with zeros.
DIFFERENT = [
    dict(seed=0, method__rank=4, method__alpha=32.0, optimizer__learning_rate=1e-2, optimizer__weight_decay=0.1, train__clip_norm=1.0),
    dict(
        seed=7, method__rank=2, method__alpha=4.0, method__rank_stabilized=True, method__init="gaussian", optimizer__learning_rate=3e-3,
        optimizer__weight_decay=0.01, optimizer__schedule__warmup_steps=0, optimizer__schedule__final=0.5, train__clip_norm=0.5,
    ),
    dict(seed=2**40 + 3, method__rank=4, method__alpha=8.0, optimizer__learning_rate=1e-3, optimizer__weight_decay=0.2),
]  # fmt: skip


PAUSE = 0.05  # seconds that a step and an evaluation of a group take at least


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Programs for one device are compiled sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        yield


def make(home, **changes):
    return runs.config(home, **{"mesh": {"data": -1}, **changes})


def different(home, **changes):
    return [make(home, **{"optimizer__weight_decay": 0.1, **own, **changes}) for own in DIFFERENT]


def same(one, other, rel=2e-6):
    """Whether two runs reported the same at every step."""
    a, b = (writer.comparable(path / "metrics.jsonl") for path in (one, other))
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=rel, abs=1e-9), x["step"]


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """Directories of the three runs, each made alone."""
    path = tmp_path_factory.mktemp("alone")
    for k, config in enumerate(different(home)):
        tuning.train(config, path / str(k))
    return [path / str(k) for k in range(3)]


class Seen(NamedTuple):
    """paths of the three runs, made in one program; what they returned; the train steps compiled for it; programs compiled at each step"""

    paths: list
    finals: list
    programs: list
    counts: list


@pytest.fixture(scope="module")
def together(home, tmp_path_factory):
    path, seen, compiled = tmp_path_factory.mktemp("together"), Seen([], [], [], []), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    original, judge, tick = many.compiled, vectorized._judge, loop.Clock.tick
    slow = lambda run: lambda *given: (time.sleep(PAUSE), run(*given))[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "compiled", lambda *args: slow(seen.programs.append(original(*args)) or seen.programs[-1]))
        patch.setattr(vectorized, "_judge", lambda *args: slow(judge(*args)))
        patch.setattr(loop.Clock, "tick", lambda self, at, means: (seen.counts.append(len(compiled)), tick(self, at, means)))
        seen.paths.extend(path / str(k) for k in range(3))
        seen.finals.extend(train_many(different(home), seen.paths))
    return seen


def test_runs_in_one_program_are_the_runs_that_they_are_alone(alone, together):
    for one, other, final in zip(alone, together.paths, together.finals, strict=True):
        same(one, other)
        assert final["eval/loss"] == writer.read(other / "metrics.jsonl")[-1]["eval/loss"]
        names = lambda path: sorted(p.name for p in path.iterdir())  # noqa: E731
        assert names(one) == names(other) and names(one / "checkpoints") == names(other / "checkpoints")
        assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
        assert tree.difference(*(tuning.load(path).params for path in (one, other))) == ""  # of its own rank


def test_what_the_first_has_made_for_all_takes_each_its_time(together):
    lines = [line for path in together.paths for line in writer.read(path / "metrics.jsonl")]
    for name, count in (("time/seconds_per_step", 6), ("time/eval_seconds", 3)):
        found = [line[name] for line in lines if name in line]
        assert len(found) == 3 * count and min(found) >= PAUSE
    assert {line["time/runs_sharing"] for line in lines} == {3}


def test_so_are_they_on_eight_devices(home, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices())
    train_many(different(home, mesh={"data": 2, "fsdp": 4}), paths := [tmp_path / str(k) for k in range(3)])
    for one, other in zip(alone, paths, strict=True):
        same(one, other, rel=1e-5)


@pytest.mark.parametrize("mesh", [{"data": 2}, {"dcn": 2, "context": 2, "tensor": 2}], ids=str)
def test_copies_of_the_base_have_members_of_their_own(home, alone, tmp_path, monkeypatch, mesh):
    """What passes between copies is each step's measures, and nothing else."""
    here = jax.local_devices()[: math.prod(mesh.values())]
    monkeypatch.setattr(jax, "devices", lambda *_: here)
    texts, original = [], many.compiled
    monkeypatch.setattr(many, "compiled", lambda *args: texts.append(original(*args)) or texts[-1])
    train_many(different(home, mesh=mesh)[:2], paths := [tmp_path / str(k) for k in range(2)])
    for one, other in zip(alone, paths, strict=False):
        same(one, other, rel=1e-5)
    passed = re.findall(r"= (.*) (?:all-\w+|reduce-scatter|collective-\w+)\(", texts[0].func.as_text())
    if len(here) == 2:
        assert passed and not [shapes for shapes in passed if not re.fullmatch(r"[sf]32\[2\]\{0\}", shapes)]


def test_a_group_over_experts(home, tmp_path, monkeypatch):
    words, path = transformers.AutoTokenizer.from_pretrained(home / "model"), tmp_path / "model"
    checkpoints.tiny("mixtral", path, vocab_size=len(words), num_hidden_layers=1, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    words.save_pretrained(path)
    configs = [config | {"model": {"path": str(path)}} for config in different(home, train__steps=4)[:2]]
    for k, config in enumerate(configs):
        tuning.train(config, tmp_path / f"alone {k}")
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:4])
    train_many([c | {"mesh": {"data": 2, "expert": 2}} for c in configs], [tmp_path / str(k) for k in range(2)])
    for k in range(2):
        same(tmp_path / f"alone {k}", tmp_path / str(k), rel=1e-5)


def test_a_group_is_compiled_once_and_multiplies_its_base_once(together):
    (program,) = together.programs
    rows = re.findall(
        r"f32\[(\d+),\d+\]\S* dot\([^)]*\), lhs_contracting_dims=\{1\}, rhs_contracting_dims=\{[01]\}", program.func.as_text()
    )
    assert rows.count(str(3 * 8 * 32)) >= 14  # all rows of all three at once, forwards and backwards through 7 kernels
    counts = together.counts
    assert len(counts) == 3 * 6 and counts[3 * 3] == counts[-1]  # after the first evaluation and checkpoint nothing is compiled any more


def test_runs_that_were_interrupted_go_on_in_a_group_or_out_of_it(home, alone, tmp_path, monkeypatch):
    paths, configs = [tmp_path / str(k) for k in range(3)], different(home)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Guard, "stops", lambda self, step: signal.SIGTERM if step == 5 else None)
        with pytest.raises(Interrupted):
            tuning.train(configs[0], paths[0])
        with pytest.raises(Interrupted, match="Stopped at step 5 by SIGTERM"):
            train_many(configs[1:], paths[1:])
    train_many(configs[:2], paths[:2])  # one that was alone, with one that was not
    tuning.train(configs[2], paths[2])
    for one, other in zip(alone, paths, strict=True):
        same(one, other)


def test_runs_that_stand_at_different_steps_go_on_one_after_the_other(home, alone, tmp_path, monkeypatch):
    paths, configs = [tmp_path / str(k) for k in range(2)], different(home)[:2]
    tuning.train(configs[0], paths[0])
    train_many(configs, paths)
    for one, other in zip(alone, paths, strict=False):
        same(one, other)


def test_runs_of_a_group_end_each_for_itself(home, tmp_path):
    """One stops early, one diverges, one goes on, and one is ended by who hears of its evaluations."""
    fixed = dict(eval={"every": 1, "patience": 2}, train__clip_norm=0.0, train__steps=10)
    sgd = lambda rate: {"name": "sgd", "learning_rate": rate, "schedule": {"name": "constant"}}  # noqa: E731
    configs = [make(home, optimizer=sgd(rate), seed=seed, **fixed) for seed, rate in enumerate((1e-12, 1e30, 0.01, 0.02))]
    heard = []

    class EnoughError(Exception):
        pass

    def hear(step, measures):
        heard.append((step, measures["eval/loss"]))
        if step == 3:
            raise EnoughError

    stopped, failed, whole, ended = train_many(configs, [tmp_path / str(k) for k in range(4)], on_eval=[None, None, None, hear])
    assert isinstance(failed, FloatingPointError) and re.match(r"Step \d: the loss .* is not finite", str(failed))
    assert stopped["step"] < 10 and whole["step"] == 10 and isinstance(ended, EnoughError)
    for k in (0, 2):
        tuning.train(configs[k], tmp_path / f"alone {k}")
        same(tmp_path / f"alone {k}", tmp_path / str(k))
    lines = [writer.read(tmp_path / str(k) / "metrics.jsonl") for k in range(4)]
    assert [lines[0][-1]["step"], lines[3][-1]["step"]] == [stopped["step"], 3]  # nothing was written after their ends
    assert heard == [(line["step"], line["eval/loss"]) for line in lines[3] if "eval/loss" in line]


LOOSE = {
    "lora": dict(rank=2, alpha=1.0, init="gaussian", b_rate=16.0), "adalora": dict(alpha=3.0), "vera": dict(d_initial=0.3),
    "loha": dict(rank=2, alpha=5.0), "lokr": dict(alpha=5.0), "bottleneck": dict(scale=3.0), "prompt": dict(init="random"),
    "prefix": dict(scale=0.5),
}  # fmt: skip
VARIANTS = {
    **{name: (name, {}) for name in METHODS if name != "full"},
    "dora": ("lora", dict(dora=True)),
    "pissa": ("lora", dict(init="pissa")),
    "beside": ("ia3", dict(also=("^norm/",))),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_takes_the_same_steps_in_a_group(home, variant):
    name, more = VARIANTS[variant]
    settings = dict(name=name, **{**SETTINGS[name], **more})
    loose = LOOSE.get(name, {}) | ({"init": "pissa"} if variant == "pissa" else {})
    loose |= {"b_rate": 1.0} if variant in ("dora", "pissa") else {}
    faster = {"b_rate": 4.0} if variant == "lora" else {}
    config = functools.partial(make, home, train__steps=12, optimizer__schedule={"name": "constant"})
    configs = [config(method=settings | faster), config(method=settings | loose, seed=3, optimizer__learning_rate=3e-3)]
    assert [group.runs for group in groups(configs)] == [(0, 1)]
    parts = [build.parts(c) for c in configs]
    whole = vectorized.largest_of(parts)
    with jax.set_mesh(whole.model.mesh):
        now = vectorized.begun(parts, whole)
        program = vectorized.program(parts, whole, now)
        loaders = [loader.Loader(p.train, batch_size=8, seed=p.config["seed"], mesh=p.model.mesh) for p in parts]
        other = parts[1 - parts.index(whole)]  # the one whose numbers the program does not have
        m, k = other.model, parts.index(other)
        own = state.start(weights.start_params(m, other.config["seed"]), m.tuned, other.optimizer.transform, m.mesh)
        took = step.jit(other.train_step(other.config["seed"]), own, loaders[k].batch(0))
        for i, stacked in zip(range(3), many.batches(whole.train, loaders, m.mesh), strict=False):
            now, means = program(now, stacked)
            own, wanted = took(own, loaders[k].batch(i))
            for key, mean in wanted.items():
                assert float(means[key].value[k]) == pytest.approx(float(mean.value), rel=1e-5 if i == 0 else 1e-4, abs=1e-7), (i, key)
        got, _ = many.Group(program, now, iter(()), [api.own_layout(p) for p in parts], None).take(k)
    for leaf, want in tree.flatten(own.tuned).items():
        np.testing.assert_allclose(tree.flatten(got)[leaf], want, rtol=1e-4, atol=2e-5)


def test_runs_are_grouped_by_what_must_be_equal(home):
    one = functools.partial(make, home)
    configs = [
        one(), one(method__dropout=0.0), one(seed=1, optimizer__learning_rate=3e-4), one(method__rank=8, method__alpha=4.0),
        one(optimizer__weight_decay=0.1), one(method={"name": "full"}), one(optimizer__weight_decay=0.2, train__clip_norm=2.0),
        one(method__b_rate=16.0), one(train__batch_size=16), one(optimizer={"name": "muon"}), one(optimizer={"name": "muon"}, seed=2),
        one(optimizer={"name": "muon"}, method__rank=8),
    ]  # fmt: skip
    found = {group.runs: group.alone for group in groups(configs)}
    assert set(found) == {(0, 2, 3), (1,), (4, 6), (5,), (7,), (8,), (9, 10), (11,)}
    assert "method.dropout=0.0 (the nearest one has 0.1)" in found[1,] and "train.batch_size=16" in found[8,]
    assert found[5,] == "method.name=full changes every weight" and "shape of blocks" in found[11,] and not found[0, 2, 3]
    assert [group.runs for group in groups([one(seed=seed) for seed in range(5)], largest=2)] == [(0, 1), (2, 3), (4,)]
    mixed = [one(method__ranks=("attn/q=8",)), one(method__ranks=("attn/k=8",)), one()]
    assert [group.runs for group in groups(mixed)] == [(0, 2), (1,)]  # neither of the first two holds the other


def test_a_fresh_base_is_shared_only_by_runs_of_one_seed(home):
    fresh = {"name": "decoder", "tokenizer": str(home / "model"), "width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16}
    configs = [make(home, model={**fresh, "hidden": 48, "max_length": 64}, seed=seed, optimizer__learning_rate=rate)
               for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 1e-2))]  # fmt: skip
    assert [group.runs for group in groups(configs)] == [(0, 2), (1,)]


def test_what_is_not_one_program_is_refused(home, tmp_path):
    configs = [make(home), make(home, method__dropout=0.0)]
    with pytest.raises(ValueError, match=r"not one program: no other run has its method\.dropout=0\.1 \(the nearest one has 0\.0\)"):
        train_many(configs, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="each another one"):
        train_many([make(home)] * 2, [tmp_path / "a"] * 2)
