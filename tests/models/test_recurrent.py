"""Recurrent networks against torch.nn.LSTM and torch.nn.GRU; packing, padding, caches, checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recurrents import BOTH, BOTH_GRU, CONFIGS, GRU, LM, TAGS, V, assert_close, build, init, one_segment, outputs, packed, tokens_of
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.decode.generate import generate
from tuning.hub import checkpoint, families, files, names
from tuning.hub import recurrent as hub
from tuning.models.heads import HeadConfig

torch = pytest.importorskip("torch")

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
one_of_each = pytest.mark.parametrize("config", [LM, BOTH_GRU], ids=["lstm", "gru both ways"])


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


def test_the_state_passes_gradients_from_one_piece_to_the_next():
    config = dataclasses.replace(LM, layers=1)
    net = build(config)
    params, tokens = init(net), tokens_of(2, 10)
    batch = one_segment(tokens)

    def hidden(params, pieces):
        cache, read = config.empty_cache(2, 10), []
        for part in pieces:
            hidden, _, cache = net.extend(params, tokens[:, part], batch.positions[:, part], batch.segments[:, part], cache)
            read.append(hidden)
        return jnp.concatenate(read, 1)

    loss = lambda pieces: lambda p: jnp.square(hidden(p, pieces)[:, -2:]).sum()  # noqa: E731
    whole, parts = [slice(0, 10)], [slice(0, 4), slice(4, 5), slice(5, 10)]
    np.testing.assert_allclose(jax.jit(lambda p: hidden(p, parts))(params), outputs(net, params, batch)[0], atol=2e-6)
    one, two = (jax.jit(jax.grad(loss(pieces)))(params) for pieces in (whole, parts))
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
    net = build(dataclasses.replace(LM, vocab_size=500, hidden=12, layers=1, tied=tied))
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
def test_a_checkpoint_is_read_as_it_was_written_and_its_tensors_load_into_torch(form, tmp_path):
    config = dataclasses.replace(WRITTEN[form], dropout=0.25, max_length=512)
    net, where = build(config), meshes.over(jax.devices()[:1])
    params, tokens = init(net), tokens_of(2, 9)
    checkpoint.save(tmp_path, params, config)
    raw = checkpoint.read_config(tmp_path)
    assert raw["architectures"] == [form] and families.config_from(raw) == config
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
