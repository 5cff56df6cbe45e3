"""Recurrent networks against torch.nn.LSTM and torch.nn.GRU; packing, padding, caches, methods and meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import hlo
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch
from tuning.decode.generate import generate
from tuning.hub import checkpoint, families, files, names
from tuning.hub import recurrent as hub
from tuning.methods import METHODS
from tuning.models import network
from tuning.models.heads import HeadConfig
from tuning.models.recurrent import RecurrentConfig
from tuning.nn import recurrent
from tuning.nn.sites import NOTHING
from tuning.objectives import OBJECTIVES
from tuning.training import flops, state, step

torch = pytest.importorskip("torch")

V = 37
LM = RecurrentConfig(vocab_size=V, width=12, hidden=16, layers=2)
GRU = dataclasses.replace(LM, cell="gru")
TAGS = HeadConfig(output="classes", classes=tuple("abcde"), bias=True)
BOTH = dataclasses.replace(LM, bidirectional=True, head=TAGS)
BOTH_GRU = dataclasses.replace(BOTH, cell="gru")
CONFIGS = {"lstm": LM, "gru": GRU, "lstm both ways": BOTH, "gru both ways": BOTH_GRU}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
one_of_each = pytest.mark.parametrize("config", [LM, BOTH_GRU], ids=["lstm", "gru both ways"])
# One way to call each method.
SETTINGS = {"full": {}, "partial": {"last_layers": 1}, "lora": {"rank": 3}}


@functools.cache
def build(config, sites=NOTHING, cuts=()):
    return network.build(config.construct(sites, cuts))


@functools.cache
def outline(config):
    return network.outline(config.construct, config.layers)


@functools.cache
def init(net, scale=1.0):
    """Random in every leaf, biases and adapters included; a `scale` above 1 makes for livelier answers."""
    rng = np.random.default_rng(0)

    def leaf(name, abstract):
        size = {"table": 1.0, "bias": 0.3, "a": 0.1, "b": 0.1}.get(name.rsplit("/", 1)[-1]) or abstract.shape[-2] ** -0.5
        return jnp.asarray(scale * size * rng.normal(size=abstract.shape), jnp.float32)

    return tree.map_named(leaf, net.abstract)


@jax.jit(static_argnums=0)
def outputs(net, params, batch, key=None):
    """(hidden_BTD, logits)"""
    hidden, head, _ = net.apply(params, batch, key)
    return hidden, head(hidden)


def one_segment(tokens, real=None):
    real = np.ones_like(tokens) if real is None else real
    return Batch(tokens, np.roll(tokens, -1, 1), real.astype(np.float32), real, np.maximum(real.cumsum(1) - 1, 0))


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length)).astype(np.int32)


def packed(rows=8, length=16, seed=0, classes=V):
    """Two segments per row, padding between them and at the end."""
    tokens = tokens_of(rows, length, seed)
    segments = np.zeros_like(tokens)
    for row in range(rows):
        segments[row, : 3 + row % 4] = 1
        segments[row, 4 + row % 4 : length - row % 3] = 2
    positions = np.where(segments == 2, np.arange(length)[None] - (segments != 2).argmin(1)[:, None], np.arange(length)[None])
    targets = np.roll(tokens, -1, 1) % classes
    return Batch(tokens, targets, (segments != 0).astype(np.float32), segments, (positions * (segments != 0)).astype(np.int32))


class Torch(torch.nn.Module):
    """The same network of torch's own modules."""

    def __init__(self, config):
        super().__init__()
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[config.cell]
        self.embed = torch.nn.Embedding(config.vocab_size, config.width)
        self.rnn = kind(config.width, config.hidden, config.layers, batch_first=True, bidirectional=config.bidirectional)
        width = config.hidden * (2 if config.bidirectional else 1)
        self.head = torch.nn.Linear(width, len(config.head.classes) or config.vocab_size, bias=config.head.bias)

    def forward(self, tokens, lengths=None):
        x = self.embed(torch.tensor(tokens, dtype=torch.long))
        if lengths is None:
            hidden, _ = self.rnn(x)
        else:
            pack = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
            hidden, _ = torch.nn.utils.rnn.pad_packed_sequence(self.rnn(pack)[0], batch_first=True, total_length=tokens.shape[1])
        return hidden, self.head(hidden)


def to_torch(params):
    """Our leaves as torch's state_dict, by the hub's table."""
    found = {}
    for leaf, values in tree.flatten(params).items():
        place = names.place(leaf, values.shape, (*hub.TABLE, hub.KERNEL, hub.BIAS))
        (tensor,), one = place.tensors, np.asarray(values[0] if place.lead else values)
        found[tensor] = torch.tensor((one.T if place.transposed else one).copy())
    return found


@functools.cache
def pair(config):
    """(network, params, torch's module with the same weights)"""
    net = build(config)
    params = init(net)
    reference = Torch(config)
    reference.load_state_dict(to_torch(params), strict=True)
    return net, params, reference


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (3, False), (2, True), (3, True)])
def test_outputs_are_those_of_torch(cell, layers, bidirectional):
    config = dataclasses.replace(LM, cell=cell, layers=layers, bidirectional=bidirectional, head=TAGS if bidirectional else LM.head)
    net, params, reference = pair(config)
    for length in (1, 19):
        tokens = tokens_of(3, length)
        with torch.no_grad():
            theirs = [x.numpy() for x in reference(tokens)]
        for mine, other in zip(outputs(net, params, one_segment(tokens)), theirs, strict=True):
            assert_close(mine, other)
    assert np.abs(theirs[0]).max() > 0.3


@every_config
def test_rows_of_several_lengths_and_their_gradients_are_those_of_torch(config):
    net, params, reference = pair(config)
    tokens, lengths = tokens_of(4, 11), [11, 3, 1, 7]
    real = (np.arange(11)[None] < np.array(lengths)[:, None]).astype(np.int32)
    batch = one_segment(tokens, real)
    targets = np.random.default_rng(1).normal(size=(4, 11, len(config.head.classes) or V)).astype(np.float32)

    def ours(params):
        hidden, head, _ = net.apply(params, batch)
        return jnp.square((head(hidden) - targets) * real[..., None]).sum(), hidden

    gradients, hidden = jax.jit(jax.grad(ours, has_aux=True))(params)
    reference.zero_grad()
    their_hidden, said = reference(tokens, lengths)
    (((said - torch.tensor(targets)) * torch.tensor(real)[..., None]) ** 2).sum().backward()
    assert_close(hidden, their_hidden.detach().numpy())
    theirs = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    mine = {name: x.numpy() for name, x in to_torch(gradients).items()}
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(mine[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


@one_of_each
def test_a_packed_example_sees_what_it_sees_alone(config):
    net, batch = build(config), packed(rows=4)
    params = init(net)
    together = outputs(net, params, batch)
    for row in range(4):
        for segment in (1, 2):
            where = np.flatnonzero(batch.segments[row] == segment)
            real = (np.arange(16) < len(where)).astype(np.int32)[None]
            tokens = np.zeros((1, 16), np.int32)
            tokens[0, : len(where)] = batch.tokens[row, where]
            alone = outputs(net, params, one_segment(tokens, real))
            for one, other in zip(together, alone, strict=True):
                np.testing.assert_allclose(one[row, where], other[0, : len(where)], atol=2e-6)
    np.testing.assert_array_equal(together[0][batch.segments[:4] == 0], 0)


@one_of_each
def test_padding_may_stand_anywhere(config):
    net = build(config)
    params, tokens = init(net), tokens_of(3, 6)
    at = np.array([[6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5], [1, 2, 5, 7, 8, 10]])  # before, after, in between
    spread, real = np.full((3, 12), 5, np.int32), np.zeros((3, 12), np.int32)
    np.put_along_axis(spread, at, tokens, 1)
    np.put_along_axis(real, at, 1, 1)
    hidden, _ = outputs(net, params, one_segment(spread, real))
    expected, _ = outputs(net, params, one_segment(tokens))
    np.testing.assert_allclose(np.take_along_axis(np.asarray(hidden), at[..., None], 1), expected, atol=2e-6)


@pytest.mark.parametrize("config, rate", [(dataclasses.replace(LM, layers=1), 0.4), (BOTH_GRU, 0.0)])
def test_the_gradients_are_those_of_differentiating_the_loop_itself(config, rate, monkeypatch):
    method = METHODS["lora"](outline(config), rank=3, dropout=rate, targets=("state",))
    net, batch = build(config, method.sites), packed()
    params = init(net)

    def gradients():
        loss = lambda p: jnp.square(net.apply(p, batch, jax.random.key(7) if rate else None)[0] - 0.5).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    one = gradients()
    monkeypatch.setattr(recurrent, "recur", recurrent.recur.fun)
    for name, expected in tree.flatten(gradients()).items():
        assert_close(tree.flatten(one)[name], expected)
        assert float(jnp.abs(expected).max()) > 1e-3 or name.startswith("head/")


def test_the_state_passes_gradients_from_one_piece_to_the_next():
    net = build(LM)
    params, tokens = init(net), tokens_of(2, 10)
    batch = one_segment(tokens)

    def hidden(params, pieces):
        cache, read = LM.empty_cache(2, 10), []
        for part in pieces:
            hidden, _, cache = net.extend(params, tokens[:, part], batch.positions[:, part], batch.segments[:, part], cache)
            read.append(hidden)
        return jnp.concatenate(read, 1)

    loss = lambda pieces: lambda p: jnp.square(hidden(p, pieces)[:, -2:]).sum()  # noqa: E731
    whole, parts = [slice(0, 10)], [slice(0, 4), slice(4, 5), slice(5, 10)]
    np.testing.assert_allclose(jax.jit(lambda p: hidden(p, parts))(params), outputs(net, params, batch)[0], atol=2e-6)
    one, two = (jax.jit(jax.grad(loss(pieces)))(params) for pieces in (whole, parts))
    jax.tree.map(assert_close, two, one)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    plain, other = build(LM), build(dataclasses.replace(LM, remat=remat))
    params, batch = init(plain), packed()
    loss = lambda net: lambda p: jnp.square(net.apply(p, batch)[0]).mean()  # noqa: E731
    one, two = (jax.jit(jax.grad(loss(net)))(params) for net in (plain, other))
    jax.tree.map(assert_close, two, one)


def test_dropout_acts_between_layers_in_training_only():
    net = build(dataclasses.replace(LM, dropout=0.5))
    params, batch = init(net), packed()
    plain, _ = outputs(build(LM), params, batch)
    np.testing.assert_array_equal(outputs(net, params, batch)[0], plain)
    one, again, other = (outputs(net, params, batch, jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-2


@pytest.mark.parametrize("tied, size", [(False, 1.0), (True, 0.02)])
def test_a_fresh_embedding_is_as_large_as_torchs_unless_it_is_the_head_too(tied, size):
    net = build(dataclasses.replace(LM, vocab_size=500, hidden=12, tied=tied))
    assert float(jax.jit(net.init)(jax.random.key(0))["embed"]["table"].std()) == pytest.approx(size, rel=0.05)


PROMPTS = [[5, 17, 9], [30], list(range(2, 25)), [7, 7, 7, 36, 1, 33]]
N = 12


@functools.cache
def greedy(config):
    net = build(config)
    return generate(net.extend, config.empty_cache, init(net, 3.0), PROMPTS, max_new_tokens=N)


@pytest.mark.parametrize("config", [LM, GRU], ids=["lstm", "gru"])
def test_cached_greedy_tokens_are_those_of_repeated_full_passes(config):
    net = build(config)
    params = init(net, 3.0)
    for prompt, said in zip(PROMPTS, greedy(config), strict=True):
        tokens = list(prompt)
        for _ in range(N):
            row, real = np.zeros((1, 40), np.int32), (np.arange(40) < len(tokens)).astype(np.int32)[None]
            row[0, : len(tokens)] = tokens
            tokens.append(int(outputs(net, params, one_segment(row, real))[1][0, len(tokens) - 1].argmax()))
        assert said == tokens[len(prompt) :]
    assert len({token for row in greedy(config) for token in row}) > 6  # a network that repeats one token would prove little


def test_generation_on_a_mesh_and_with_other_padding_gives_the_same_tokens():
    net = build(LM)
    assert generate(net.extend, LM.empty_cache, init(net, 3.0), PROMPTS, max_new_tokens=N, pad=33) == greedy(LM)
    where = meshes.mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(where):
        params = jax.device_put(init(net, 3.0), meshes.shardings(net.abstract, net.axes, where))
        assert generate(net.extend, LM.empty_cache, params, PROMPTS, max_new_tokens=N) == greedy(LM)


def train(config, method, sizes=None, steps=12):
    """(losses, state before, state after, method, network) of a few steps on a mesh."""
    sizes = sizes or {"data": 1}
    where = meshes.over(jax.devices()[: np.prod(list(sizes.values()))], **sizes)
    chosen = METHODS[method](outline(config), **SETTINGS[method])
    net = build(config, chosen.sites, chosen.cuts)
    transform = optax.adamw(3e-2)
    with jax.set_mesh(where):
        params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
        start = state.start(params, chosen.tuned, transform, where)
        before = jax.device_get(start)
        batch = jax.device_put(packed(classes=len(config.head.classes) or V), meshes.rows(where))
        made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
        compiled, losses = step.jit(made, start, batch), []
        for _ in range(steps):
            start, means = compiled(start, batch)
            losses.append(float(means["loss"].value))
        return losses, before, jax.device_get(start), chosen, net


@functools.cache
def on_one_device(config, method):
    return train(config, method)


@pytest.mark.parametrize("config, method", [(LM, "full"), (GRU, "partial"), (BOTH_GRU, "lora")])
def test_every_method_learns_and_leaves_frozen_leaves_alone(config, method):
    losses, before, after, chosen, net = on_one_device(config, method)
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert all(bool((a != b).any()) for a, b in zip(jax.tree.leaves(before.tuned), jax.tree.leaves(after.tuned), strict=True))
    params = tree.merge(after.tuned, after.frozen)
    said, folded = outputs(net, params, packed())[1], chosen.fold(params)
    assert_close(outputs(build(config), folded, packed())[1], said)


def test_lora_offers_each_projection_of_each_layer_and_direction():
    def adapted(*targets):
        method = METHODS["lora"](outline(BOTH), targets=targets)
        names = tree.flatten(build(BOTH, method.sites).abstract)
        return {n.removesuffix("/adapter/a") for n in names if n.endswith("adapter/a")}

    roles = [f"{way}/{part}" for way in ("forward", "backward") for part in ("input", "state")]
    assert adapted("all") == {f"blocks/{i}-{i}/{role}" for i in range(2) for role in roles}
    assert adapted("state") == {f"blocks/{i}-{i}/{way}/state" for i in range(2) for way in ("forward", "backward")}
    assert adapted("backward/.*") == {f"blocks/{i}-{i}/backward/{part}" for i in range(2) for part in ("input", "state")}


@pytest.mark.parametrize(
    "config, method, sizes", [(LM, "full", {"data": 2, "fsdp": 2, "tensor": 2}), (BOTH_GRU, "lora", {"fsdp": 8})], ids=["full", "lora"]
)
def test_every_mesh_gives_the_losses_of_one_device(config, method, sizes):
    losses, expected = train(config, method, sizes)[0], on_one_device(config, method)[0]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_eight_devices_give_the_same_logits():
    for config in (LM, BOTH):
        net, batch = build(config), packed()
        expected = outputs(net, init(net), batch)[1]
        where = meshes.mesh(data=2, fsdp=2, tensor=2)
        with jax.set_mesh(where):
            params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
            assert not params["blocks"]["0-0"]["forward"]["state"]["kernel"].sharding.is_fully_replicated
            assert_close(outputs(net, params, jax.device_put(batch, meshes.rows(where)))[1], expected)


def test_devices_share_the_arithmetic_and_no_loop_over_time_waits_for_another():
    net, batch = build(LM), packed()
    loss = lambda p, batch: jnp.square(net.apply(p, batch)[0]).sum()  # noqa: E731
    where = meshes.mesh(data=2, fsdp=4)
    with jax.set_mesh(where):
        params = jax.device_put(init(net), meshes.shardings(net.abstract, net.axes, where))
        text = jax.jit(jax.grad(loss)).lower(params, jax.device_put(batch, meshes.rows(where))).compile().as_text()
    alone = jax.jit(jax.grad(loss)).lower(init(net), batch).compile().as_text()
    assert 8 * hlo.dot_flops(text) <= 1.05 * hlo.dot_flops(alone)
    collective = re.compile(r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)")
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside = [line for name in bodies for line in hlo._computations(text)[name][0] if collective.search(line)]
    assert len(bodies) >= 4 and collective.search(text) and inside == []


WIDE = RecurrentConfig(vocab_size=256, width=128, hidden=128, layers=2)


@pytest.mark.parametrize(
    "cell, method, settings", [("lstm", "full", {}), ("gru", "lora", {"rank": 8}), ("lstm", "partial", {"last_layers": 1})]
)
def test_the_compiled_step_makes_no_more_dots_than_the_formula(cell, method, settings):
    config = dataclasses.replace(WIDE, cell=cell)
    chosen = METHODS[method](outline(config), **settings)
    net, transform = build(config, chosen.sites, chosen.cuts), optax.adamw(1e-3)
    layout = state.layout(net.abstract, net.axes, lambda name: "float32", meshes.over(jax.devices()[:1], data=1))
    learns, rests = tree.split(layout, chosen.tuned)
    abstract = state.TrainState(jax.ShapeDtypeStruct((), jnp.int32), learns, rests, jax.eval_shape(transform.init, learns))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed(4, 32))
    made = step.train_step(net.apply, OBJECTIVES["next_token"](), transform, accumulate=1, clip_norm=1.0, seed=0)
    counted = hlo.dot_flops(jax.jit(made).lower(abstract, batch).compile().as_text()) / (4 * 32)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(layout).items()}
    formula = flops.flops_per_token(shapes, chosen.tuned, config.attention_flops(32))
    assert 0.85 * formula <= counted <= 1.15 * formula  # the lowest layer that learns has no input to pass a gradient to


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_every_matmul_has_the_precision_that_the_config_asks_for(precision):
    net, batch = build(dataclasses.replace(BOTH, precision=precision)), packed()

    def loss(params):
        hidden, head, _ = net.apply(params, batch)
        return head(hidden).sum()

    with jax.default_matmul_precision("default"):
        text = jax.jit(jax.grad(loss)).lower(init(net)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    exact = [line for line in dots if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(dots) > 20 and len(exact) == (len(dots) if precision == "highest" else 0)


@one_of_each
def test_bfloat16_stays_near_float32_and_keeps_its_state_in_float32(config):
    half, batch = dataclasses.replace(config, dtype="bfloat16"), packed()
    net = build(half)
    hidden, _ = outputs(net, init(net), batch)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype(jnp.float32), outputs(build(config), init(net), batch)[0], atol=0.05)
    if not config.bidirectional:
        cache = half.empty_cache(8, 16)
        _, _, after = jax.jit(net.extend)(init(net), batch.tokens, batch.positions, batch.segments, cache)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        assert {x.dtype for x in jax.tree.leaves(after.states)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_take_their_places_in_the_vocabulary(tied):
    plain_config = dataclasses.replace(LM, hidden=12, tied=tied)
    config = dataclasses.replace(plain_config, added=(V - 2, 4))
    net, plain = build(config), build(dataclasses.replace(plain_config, vocab_size=V + 2))
    assert config.vocabulary == V + 2
    params, rows = {**init(net)}, jax.random.normal(jax.random.key(1), (4, 12))
    table = jnp.zeros((V + 2, 12)).at[:V].set(params["embed"]["table"]).at[V - 2 :].set(rows)
    expected = {**params, "embed": {"table": table}}
    params["embed"] = {**params["embed"], "added": rows}
    if not tied:
        expected["head"] = {"kernel": jnp.zeros((12, V + 2)).at[:, :V].set(params["head"]["kernel"]).at[:, V - 2 :].set(2 * rows.T)}
        params["head"] = {**params["head"], "added": 2 * rows}
    batch = one_segment(np.arange(V + 2, dtype=np.int32)[None])
    assert_close(outputs(net, params, batch)[1], outputs(plain, expected, batch)[1])


SORTED = {pool: HeadConfig(output="classes", classes=("no", "yes"), pool=pool, bias=True) for pool in ("last", "mean")}
WRITTEN = {
    "RecurrentForCausalLM": LM,
    "RecurrentForTokenClassification": BOTH,
    "RecurrentForSequenceClassification": dataclasses.replace(GRU, head=SORTED["last"]),
    "RecurrentMeanForSequenceClassification": dataclasses.replace(BOTH_GRU, head=SORTED["mean"]),
    "RecurrentModel": dataclasses.replace(BOTH, head=HeadConfig(output="hidden")),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_checkpoint_is_read_as_it_was_written_and_its_tensors_load_into_torch(form, tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, hub.MODEL_TYPE, hub.FAMILIES[hub.MODEL_TYPE])
    config = dataclasses.replace(WRITTEN[form], dropout=0.25, max_length=512)
    raw = {"model_type": hub.MODEL_TYPE, "architectures": [form], **hub.write(config)}
    if config.head.classes:
        raw["id2label"] = {str(i): name for i, name in enumerate(config.head.classes)}
    net, where = build(config), meshes.over(jax.devices()[:1])
    params, tokens = init(net), tokens_of(2, 9)
    checkpoint.save(tmp_path, params, config, original=raw)
    raw = checkpoint.read_config(tmp_path)
    assert families.config_from(raw) == config
    again = checkpoint.load(tmp_path, net.abstract, meshes.shardings(net.abstract, net.axes, where), lambda name: jnp.float32, raw)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tensors = files.Tensors(tmp_path)
    reference = Torch(config).eval()
    reference.load_state_dict({name: torch.tensor(np.array(tensors.read(name))) for name in tensors}, strict=form != "RecurrentModel")
    with torch.no_grad():
        hidden, said = (x.numpy() for x in reference(tokens))
    mine = outputs(net, params, one_segment(tokens))
    assert_close(mine[0], np.broadcast_to(hidden.mean(1, keepdims=True), hidden.shape) if config.head.pool == "mean" else hidden)
    if config.head.pool != "mean" and form != "RecurrentModel":
        assert_close(mine[1], said)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"proj_size": 4}, "does not know proj_size"),
        ({"hidden": None}, "hidden=None must be of type int"),
        ({"bidirectional": 1}, "bidirectional=1 must be of type bool"),
        ({"layers": 2.0}, "layers=2.0 must be of type int"),
        ({"cell": "elman"}, "cell='elman' is not one of lstm, gru"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hub.read({**hub.write(LM), **change})


@pytest.mark.parametrize(
    "config, change, message",
    [
        (LM, {"hidden": 0}, "hidden=0"),
        (LM, {"dropout": 1.0}, "dropout=1.0 lies in"),
        (LM, {"layers": 1, "dropout": 0.1}, "acts between layers"),
        (LM, {"bidirectional": True}, "sees what it is to say"),
        (LM, {"tied": True}, "needs hidden=16 to be width=12"),
        (BOTH, {"head": dataclasses.replace(TAGS, pool="last")}, "at the last token one of the directions has read nothing else"),
        (LM, {"added": (V + 1, 2)}, "leaves a gap"),
        (LM, {"dtype": "float16"}, "model.dtype='float16' is not one of"),
    ],
)
def test_what_cannot_be_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_what_reads_both_ways_has_no_cache():
    with pytest.raises(ValueError, match="depends on the tokens behind it"):
        BOTH.empty_cache(1, 8)
