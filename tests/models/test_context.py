"""Sequences that are split over devices: every kind of network gives what one device gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import hlo, tiny
from tuning.core import mesh as meshes
from tuning.core.types import Inputs
from tuning.hub import families
from tuning.methods import METHODS
from tuning.models import network
from tuning.models.heads import HeadConfig
from tuning.nn import blockwise
from tuning.nn.block import Kind
from tuning.objectives import OBJECTIVES

change = lambda **fields: dataclasses.replace(tiny.CONFIG, **{"layers": 2, "kinds": (), **fields})  # noqa: E731
CLASSES = HeadConfig(output="classes", classes=tuple("abcde"), pool="mean")
T5 = dict(
    model_type="t5", vocab_size=67, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, feed_forward_proj="gated-gelu",
    tie_word_embeddings=True, dropout_rate=0.0, decoder_start_token_id=0,
)  # fmt: skip

NETWORKS = {
    "windows and a cap": change(kinds=(Kind(window=5), Kind()), softcap=3.0),
    "splash": change(attention="splash_interpreted", max_length=256, kinds=(Kind(window=70), Kind())),
    "splash both ways": change(attention="splash_interpreted", max_length=256, causal=False),
    "encoder, mean": change(causal=False, positions="learned", head=CLASSES),
    "alibi": change(positions="alibi"),
    "keys' alibi": change(positions="alibi_keys"),
    "longrope": change(rope_scaling=dict(
        rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=7, attention_factor=1.0)),
    "experts": change(kinds=(Kind(), Kind(routed=True)), experts=4, per_token=2, expert_hidden=16),
    "encoder-decoder": families.config_from(T5),
}  # fmt: skip


def losses(config, method, sizes, length):
    """(loss, gradients) on a mesh."""
    chosen = METHODS[method](network.outline(config.construct, config.layers))
    net = network.build(config.construct(chosen.sites, chosen.cuts))
    params, batch = jax.jit(net.init)(jax.random.key(0)), tiny.batch(rows=4, length=length)
    if config.reads == "encoder_decoder":
        other = tiny.batch(rows=4, length=2 * length, seed=1)
        batch = dataclasses.replace(batch, inputs=Inputs(other.tokens, other.segments, other.positions))
    if config.head.classes:
        batch = dataclasses.replace(batch, targets=batch.targets % 5)
    objective = OBJECTIVES["labels" if config.head.classes else "next_token"]()
    loss = lambda params, batch: objective(lambda batch: net.apply(params, batch), batch)["loss"].value  # noqa: E731
    where = meshes.over(jax.devices()[: np.prod([1, *sizes.values()])], **sizes)
    with jax.set_mesh(where):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, jax.device_put(batch, meshes.rows(where))).compile()
        return compiled(params, jax.device_put(batch, meshes.rows(where))), compiled


@pytest.mark.parametrize("case", [*NETWORKS, "prefix"])
def test_a_split_sequence_gives_the_loss_and_the_gradients_of_a_whole_one(case, monkeypatch):
    config, method = NETWORKS.get(case, change()), "prefix" if case == "prefix" else "full"
    splash = "splash" in case
    sizes, length = {"fsdp": 2, "context": 2, **({} if splash else {"tensor": 2})}, 256 if splash else 16
    monkeypatch.setattr(blockwise, "SCORES", 64)
    (one, slopes), _ = losses(config, method, {"data": 1}, length)
    (two, others), _ = losses(config, method, sizes, length)
    np.testing.assert_allclose(two, one, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max()))), slopes, others)


def test_every_device_works_on_its_piece_of_a_sequence_alone():
    """The arithmetic of a device falls with the pieces: no layer and no part of the loss is computed by all."""
    whole, piece = (hlo.dot_flops(losses(change(), "full", {"context": n}, 64)[1].as_text()) for n in (1, 4))
    assert piece == whole / 4
