"""Every family against transformers: logits, gradients, packing, cached decoding, sharding, LoRA, the way back, and its parameter tree.

A family joins by a line in tests/checkpoints.py. Rows are long enough to cross sliding windows and the lengths at which rotary scaling
sets in. Shapes: B sequences, T tokens.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning import export
from tuning.core import mesh, tree
from tuning.core.types import Batch, Inputs
from tuning.hub import checkpoint, families, files, names
from tuning.methods.lora import lora
from tuning.methods.partial import partial
from tuning.models import network
from tuning.nn import rotary

torch = pytest.importorskip("torch")
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
B, T = 3, 40
LENGTHS = (40, 25, 3)

every_entry = pytest.mark.parametrize("family", checkpoints.FAMILIES)
# For what does not depend on the head, or on a number of the rotation: the first entry of each model_type, and those with other layers.
every_body = pytest.mark.parametrize("family", checkpoints.bodies())


def make(config, segments_BT) -> Batch:
    """A batch of these segments; for an encoder-decoder its decoder reads other tokens, laid out alike."""
    tokens = checkpoints.tokens(B, T, config.vocab_size) * (segments_BT > 0)  # padding is token 0: some references go by that
    at = np.arange(T)[None]
    first = np.stack([[np.argmax(row == s) if s else 0 for s in row] for row in segments_BT])
    positions = np.where(segments_BT > 0, at - first, 0).astype(np.int32)
    segments, weights = segments_BT.astype(np.int32), (segments_BT > 0).astype(np.float32)
    inputs = Inputs(tokens.astype(np.int32), segments, positions) if config.reads == "encoder_decoder" else None
    read = tokens[::-1].copy() if inputs is not None else tokens
    types = (tokens % 2).astype(np.int32) if getattr(config, "type_count", 0) > 1 else None
    return Batch(read.astype(np.int32), read.astype(np.int32), weights, segments, positions, types, inputs)


def padded(config) -> Batch:
    return make(config, np.stack([np.arange(T) < n for n in LENGTHS]).astype(np.int32))


def packed(config) -> Batch:
    """Two examples in each row, and padding behind them in all but the first."""
    edges = ((18, 40), (30, 38), (5, 31))
    return make(config, np.stack([np.where(np.arange(T) < a, 1, np.where(np.arange(T) < b, 2, 0)) for a, b in edges]))


def pool(how, batch: Batch, said):
    """What is compared: every token's answer, or the one that stands for the sequence."""
    if not how.pool:
        return said
    real = batch.segments != 0
    at = real.sum(1) - 1 if how.pool == "last" else np.zeros(len(real), int)
    return said[np.arange(len(real)), at]


def weights_of(how, batch: Batch):
    return batch.weights if not how.pool else np.ones(len(batch.weights), np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def answer(apply, how, params, batch):
    """(logits, gradients of the mean negative log-likelihood of each token's own id)."""

    def loss(params):
        hidden, head, _ = apply(params, batch)
        said = pool(how, batch, head(hidden))
        targets = pool(how, batch, batch.targets) % said.shape[-1]
        weights = weights_of(how, batch)
        own = jnp.take_along_axis(jax.nn.log_softmax(said), targets[..., None], -1)[..., 0]
        return -(own * weights).sum() / weights.sum(), said

    (_, said), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return said, gradients


def ask(model, batch: Batch):
    """The answers of the transformers model, [B, T, V] or [B, C]."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in rotary.ADAPTIVE and batch.tokens.shape[0] > 1:
        # There the longest row decides for all, and later calls remember it: so one by one, the shortest first.
        sizes = (batch.segments != 0).sum(1)
        rows = {i: ask(model, jax.tree.map(lambda x, i=i: x[i : i + 1, : sizes[i]], batch)) for i in np.argsort(sizes)}
        return torch.cat([torch.nn.functional.pad(rows[i], (0, 0, 0, T - int(sizes[i]))) for i in range(len(sizes))])
    tensor = lambda x: None if x is None else torch.tensor(np.asarray(x, np.int64))  # noqa: E731
    mask = tensor(batch.segments != 0)
    if batch.inputs is not None:
        out = model(tensor(batch.inputs.tokens), attention_mask=mask, decoder_input_ids=tensor(batch.tokens), decoder_attention_mask=mask)
    else:
        types = {} if batch.types is None else {"token_type_ids": tensor(batch.types)}
        out = model(tensor(batch.tokens), attention_mask=mask, **types)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    return next(out[key] for key in ("logits", "pooler_output", "last_hidden_state") if key in out)


def expected(family, reference_of, config, batch):
    """(answers, gradients by tensor name) of transformers."""
    model, how = reference_of(family), config.head
    model.zero_grad()
    said = ask(model, batch)
    targets = torch.tensor(pool(how, batch, batch.targets).astype(np.int64)) % said.shape[-1]
    own = torch.log_softmax(said, -1).gather(-1, targets[..., None])[..., 0]
    weights = torch.tensor(weights_of(how, batch))
    (-(own * weights).sum() / weights.sum()).backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return said.detach().numpy(), found | dict(single_experts(found))


def single_experts(found):
    """The gradients of experts under their names on disk; in memory, transformers stacks them."""
    for name, gradient in found.items():
        layer, routed, part = name.partition(".mlp.experts.")
        for e, one in enumerate(gradient if routed else ()):
            parts = {"w2": one, "down_proj": one}
            if part == "gate_up_proj":
                gate, up = np.split(one, 2)
                parts = {"w1": gate, "w3": up, "gate_proj": gate, "up_proj": up}
            for part_name, values in parts.items():
                for home in ("mlp", "block_sparse_moe"):
                    yield f"{layer}.{home}.experts.{e}.{part_name}.weight", values
        if name.endswith("mlp.gate.weight"):
            yield name.replace("mlp.gate", "block_sparse_moe.gate"), gradient


def assert_same(got, reference, where=None, bound=1e-5):
    gap = np.abs(np.asarray(got) - reference)
    gap = gap if where is None or gap.ndim == 2 else gap[where]
    assert gap.max() <= bound * max(1, np.abs(reference).max()), gap.max()


@pytest.fixture(scope="module")
def answers(ours_of):
    """family -> (batch, logits, gradients) of the padded batch."""

    def run(family):
        net = ours_of(family)
        batch = padded(net.config)
        return batch, *jax.device_get(answer(net.network.apply, net.config.head, net.params, batch))

    return functools.cache(run)


@pytest.fixture
def spread_of(ours, checkpoint_of):
    """(family, mesh, sites) -> our network, read anew."""
    return lambda family, where=None, **built: ours(checkpoint_of(family), where=where, **built)


@every_entry
def test_logits_and_gradients_are_those_of_transformers(family, answers, ours_of, reference_of):
    net = ours_of(family)
    batch, said, gradients = answers(family)
    reference, theirs = expected(family, reference_of, net.config, batch)
    assert_same(said, reference, batch.segments != 0)
    compared = set()
    for leaf, gradient in tree.flatten(gradients).items():
        place = names.place(leaf, gradient.shape, net.table)
        for index, name in zip(np.ndindex(*place.lead), place.tensors, strict=True):
            if name in theirs:
                one = gradient[index].T if place.transposed else gradient[index]
                assert np.abs(one - theirs[name]).max() <= 1e-4 * np.abs(theirs[name]).max() + 1e-7, name
                compared.add(leaf)
    assert len(compared) >= len(tree.flatten(gradients)) - 1  # one leaf may go by another name there


@every_entry
def test_a_packed_example_says_what_it_says_alone_in_transformers(family, ours_of, reference_of):
    net = ours_of(family)
    batch, head = packed(net.config), net.config.head
    each = dataclasses.replace(head, pool="")
    said = np.asarray(forward(net.network.apply, each, net.params, batch))
    for row in range(B):
        for segment in (1, 2):
            at = np.flatnonzero(batch.segments[row] == segment)
            cut = lambda x, row=row, at=at: x[row : row + 1, at]  # noqa: E731
            alone = jax.tree.map(cut, batch)
            alone = dataclasses.replace(alone, segments=np.ones_like(alone.segments))
            answer = {"": slice(None), "last": -1}.get(head.pool, 0)  # a mean stands at every token
            with torch.no_grad():
                assert_same(said[row, at][answer][None], ask(reference_of(family), alone).numpy())


@every_body
def test_cached_decoding_equals_the_full_forward(family, answers, ours_of):
    net = ours_of(family)
    if net.config.reads == "encoder" or net.config.head.output != "vocabulary":
        pytest.skip("it does not generate")
    batch, said, _ = answers(family)
    rows = jax.tree.map(lambda x: x[:1], batch)
    cache = net.config.empty_cache(1, T)
    if rows.inputs is not None:
        cache = net.network.remember(net.params, rows.inputs, cache)
    extend, got = jax.jit(net.network.extend), []
    for start in range(0, T, 4):
        part = slice(start, start + 4)
        hidden, head, cache = extend(net.params, rows.tokens[:, part], rows.positions[:, part], rows.segments[:, part], cache)
        got.append(head(hidden))
    assert_same(np.concatenate(got, 1), said[:1])


@every_body
def test_a_mesh_of_eight_devices_says_the_same(family, answers, spread_of, checkpoint_of):
    routed = getattr(families.config_from(checkpoint.read_config(checkpoint_of(family))), "experts", 0)
    where = mesh.over(jax.devices(), tensor=2, **(dict(fsdp=2, expert=2) if routed else dict(fsdp=4)))
    net = spread_of(family, where)
    _, said, _ = answers(family)
    rows = lambda x: np.concatenate([x, x[:1]])  # noqa: E731  the mesh splits four rows
    with jax.set_mesh(where):
        batch = jax.device_put(jax.tree.map(rows, padded(net.config)), mesh.rows(where))
        spread = np.asarray(forward(net.network.apply, net.config.head, net.params, batch))[:B]
    assert_same(spread, said, padded(net.config).segments != 0)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(net.params))


@every_body
def test_lora_everywhere_starts_at_the_base_and_folds_back(family, spread_of, ours_of, answers):
    base = ours_of(family)
    method = lora(network.outline(base.config.construct, base.config.layers), rank=2)
    net = spread_of(family, sites=method.sites)
    batch, said, _ = answers(family)
    rng = np.random.default_rng(1)
    start = tree.map_named(lambda name, x: jnp.zeros(x.shape) if name.endswith("/b") else jnp.full(x.shape, 0.1), net.extra)
    tuned = tree.map_named(lambda _, x: jnp.asarray(rng.normal(size=x.shape) * 0.05, jnp.float32), net.extra)
    assert_same(forward(net.network.apply, net.config.head, tree.merge(net.params, start), batch), said, batch.segments != 0)
    params = tree.merge(net.params, tuned)
    folded = forward(base.network.apply, base.config.head, method.fold(params), batch)
    assert_same(forward(net.network.apply, net.config.head, params, batch), np.asarray(folded), batch.segments != 0)
    assert np.abs(np.asarray(folded) - said).max() > 1e-3


@every_body
def test_the_last_layer_can_be_tuned_alone(family, spread_of, ours_of):
    whole = ours_of(family)
    method = partial(network.outline(whole.config.construct, whole.config.layers), last_layers=1)
    cut = spread_of(family, cuts=method.cuts)
    leaves = tree.flatten(cut.params)
    last = whole.config.layers - 1
    learn = {name for name in leaves if method.tuned(name)}
    assert learn and all(f"blocks/{last}-{last}/" in name and not name.startswith("encoder/") for name in learn)
    back = tree.flatten(export.restack(cut.params, whole.params))
    assert all(np.array_equal(back[name], leaf) for name, leaf in tree.flatten(whole.params).items())


@every_entry
def test_saving_what_was_read_gives_the_same_bits(family, tmp_path, ours_of, checkpoint_of):
    net = ours_of(family)
    checkpoint.save(tmp_path, net.params, net.config, original=net.raw, shard_bytes=20_000)
    before, after = files.Tensors(checkpoint_of(family)), files.Tensors(tmp_path)
    assert set(before) == set(after)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before)
    assert json.loads((tmp_path / "config.json").read_text()) == net.raw
    checkpoints.reference(tmp_path, checkpoints.FAMILIES[family].get("auto", "CausalLM"))  # raises if a tensor is missing or unknown


@every_entry
def test_a_network_made_here_exports_to_a_family_that_can_express_it(family, tmp_path, ours_of, answers):
    net = ours_of(family)
    batch, said, _ = answers(family)
    checkpoint.save(tmp_path, net.params, net.config)
    model = checkpoints.reference(tmp_path, checkpoints.FAMILIES[family].get("auto", "CausalLM"))
    assert model.config.bos_token_id is None and model.config.eos_token_id is None  # not the class's own
    model.config.pad_token_id = 0  # by which some find the last token; a tokenizer would have said it
    with torch.no_grad():
        assert_same(said, ask(model, batch).numpy(), batch.segments != 0)


@every_entry
def test_the_parameter_tree_is_the_golden_one(family, ours_of):
    net = ours_of(family)
    axes, leaves = tree.flatten(net.network.axes), tree.flatten(net.params)
    text = "".join(f"{name} {leaf.shape} {axes[name]} {leaf.dtype}\n" for name, leaf in leaves.items())
    golden = GOLDEN / f"{family}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"{golden} differs; UPDATE_GOLDEN=1 writes it anew"


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(apply, how, params, batch):
    hidden, head, _ = apply(params, batch)
    return pool(how, batch, head(hidden))
