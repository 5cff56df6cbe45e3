"""T5 and mT5 beyond what every family is tested for: what their config.json says in several ways, old files, generation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning.core import tree
from tuning.core.types import Batch, Inputs
from tuning.decode.generate import generate
from tuning.hub import checkpoint, families, files

torch = pytest.importorskip("torch")

# The keys of google-t5/t5-small's config.json that matter, and those of google/flan-t5-small's.
PUBLISHED = {
    "model_type": "t5", "architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}  # fmt: skip
FLAN = {
    **PUBLISHED, "architectures": ["T5ForConditionalGeneration"], "d_ff": 1024, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 8,
    "num_heads": 6, "num_layers": 8, "tie_word_embeddings": False,
}  # fmt: skip


def test_published_files_are_read_as_what_they_are():
    old, flan = families.config_from(PUBLISHED), families.config_from(FLAN)
    assert (old.tied, old.head.scale, old.decoder.activation, old.decoder.gated) == (True, 512**-0.5, "relu", False)
    assert (flan.tied, flan.head.scale, flan.decoder.activation, flan.decoder.gated) == (False, 1.0, "gelu_tanh", True)
    assert (old.encoder.layers, old.decoder.layers, old.decoder.relative, old.start) == (6, 6, (32, 128), 0)
    assert old.max_length > 100_000  # n_positions is no limit: any distance has a bucket
    for raw in (PUBLISHED, FLAN):
        assert families.config_to(families.config_from(raw), raw, dtype="float32") == {**raw, "dtype": "float32"}


@pytest.mark.parametrize(
    ("said", "activation", "gated"),
    [
        ({}, "relu", False),
        ({"feed_forward_proj": "gated-gelu"}, "gelu_tanh", True),
        ({"feed_forward_proj": "gelu"}, "gelu", False),
        ({"feed_forward_proj": "gated-silu"}, "silu", True),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "gelu", True),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "relu", True),
        ({"model_type": "mt5", "architectures": None}, "gelu_tanh", True),
    ],
)
def test_the_feed_forward_layer_is_the_one_that_transformers_builds(said, activation, gated):
    from transformers import AutoConfig

    config, theirs = families.config_from({**PUBLISHED, **said}), AutoConfig.for_model(**{**PUBLISHED, **said})
    assert (config.decoder.activation, config.decoder.gated) == (activation, gated)
    assert theirs.is_gated_act == gated and {"gelu_new": "gelu_tanh"}.get(theirs.dense_act_fn, theirs.dense_act_fn) == activation
    assert families.architecture(families.config_from(families.config_to(config))) == families.architecture(config)


@pytest.mark.parametrize("tie", [..., None, True, False])
@pytest.mark.parametrize("scale", [..., True, False])
def test_the_decoders_output_is_scaled_where_transformers_scales_it(tie, scale):
    from transformers import T5Config

    said = {key: value for key, value in (("tie_word_embeddings", tie), ("scale_decoder_outputs", scale)) if value is not ...}
    config = families.config_from({**PUBLISHED, **said})
    assert (config.head.scale != 1) == T5Config(**said).scale_decoder_outputs
    assert config.tied == (tie is not False)
    assert families.config_from({**PUBLISHED, **said, "model_type": "mt5", "architectures": None}).head.scale == 1


def test_the_tensors_tell_a_head_of_its_own_and_the_scale_stays(checkpoint_of, ours_of, tmp_path):
    for family, scaled in (("t5_gated", False), ("mt5", False)):
        assert json.loads((checkpoint_of(family) / "config.json").read_text())["tie_word_embeddings"] is True
        assert not ours_of(family).config.tied and (ours_of(family).config.head.scale != 1) == scaled
    plain = checkpoints.tiny("t5", tmp_path, untied=True)
    raw = checkpoint.read_config(plain)
    assert not families.config_from(raw).tied and families.config_from(raw).head.scale == 32**-0.5
    assert ours_of("t5").config.tied and ours_of("t5").raw["tie_word_embeddings"] is True


def rewrite(directory, tmp_path, change, **said):
    """A copy of a checkpoint with its tensors changed, and keys of its config.json; None takes one away."""
    tensors = files.Tensors(directory)
    values = {name: tensors.read(name) for name in tensors}
    change(values)
    files.write(tmp_path, values.items())
    raw = {**json.loads((directory / "config.json").read_text()), **said}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return tmp_path


def test_old_files_with_their_copies_are_read_as_the_new_ones(tmp_path, checkpoint_of, ours_of, ours):
    def old(values):
        values["encoder.embed_tokens.weight"] = values["decoder.embed_tokens.weight"] = values["shared.weight"]
        values["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)

    def differ(values):
        values["encoder.embed_tokens.weight"] = values["shared.weight"] + 1

    # transformers 4 wrote tie_word_embeddings as it was, and no scale_decoder_outputs.
    before = ours(rewrite(checkpoint_of("t5_gated"), tmp_path / "old", old, tie_word_embeddings=False, scale_decoder_outputs=None))
    assert before.config == ours_of("t5_gated").config
    for name, leaf in tree.flatten(ours_of("t5_gated").params).items():
        assert np.array_equal(leaf, tree.flatten(before.params)[name]), name
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight differs from shared.weight"):
        ours(rewrite(checkpoint_of("t5"), tmp_path / "differ", differ))


TOKENS = checkpoints.tokens(2, 12)
PROMPTS = [[5, 17, 9, 1], [40, 1], [*range(3, 45), 1]]


def test_greedy_answers_are_those_of_transformers(ours_of, reference_of):
    net, model = ours_of("t5_gated"), reference_of("t5_gated")
    ours = generate(
        net.network.extend, net.config.empty_cache, net.params, [[net.config.start]] * 3, max_new_tokens=20,
        max_length=net.config.max_length, remember=net.network.remember, inputs=PROMPTS,
    )  # fmt: skip
    tokens = torch.tensor([[*prompt, *[0] * (43 - len(prompt))] for prompt in PROMPTS])
    greedy = dict(max_new_tokens=20, do_sample=False, num_beams=1, eos_token_id=None)
    assert ours == model.generate(tokens, attention_mask=(tokens > 0).long(), **greedy)[:, 1:].tolist()
    assert len({token for row in ours for token in row}) > 10


def test_a_cut_decoder_reads_the_same_checkpoint(ours, checkpoint_of, ours_of):
    whole, cut = ours_of("t5"), ours(checkpoint_of("t5"), cuts=(1,))
    assert set(cut.params["decoder"]["blocks"]) == {"0-0", "1-1"} and set(cut.params["encoder"]["blocks"]) == {"0-2"}
    assert np.abs(answer(cut) - answer(whole)).max() <= 1e-5 * np.abs(answer(whole)).max()


def answer(net, tokens=TOKENS, params=None):
    """[B, T, V], the decoder reading the encoder's tokens backwards."""
    ones, at = np.ones_like(tokens, np.int32), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(tokens[:, ::-1].astype(np.int32), None, None, ones, at, inputs=Inputs(tokens.astype(np.int32), ones, at))
    hidden, head, _ = jax.jit(net.network.apply)(net.params if params is None else params, batch)
    return np.asarray(head(hidden))


def theirs(directory, auto, tokens=TOKENS):
    """The same of the transformers model of a directory."""
    with torch.no_grad():
        out = checkpoints.reference(directory, auto)(torch.tensor(tokens), decoder_input_ids=torch.tensor(tokens[:, ::-1].copy()))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_added_tokens_stand_in_the_embedding_of_both_sides(family, tmp_path, ours, checkpoint_of):
    net = ours(checkpoint_of(family), added=(100, 2))
    rng = np.random.default_rng(0)
    params = tree.merge(net.params, tree.map_named(lambda _, x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), net.extra))
    checkpoint.save(tmp_path, params, net.config, original=net.raw)
    tokens = TOKENS.copy()
    tokens[:, 3], tokens[:, 7] = 100, 101
    reference = theirs(tmp_path, "Seq2SeqLM", tokens)
    assert reference.shape[-1] == 102
    assert np.abs(answer(net, tokens, params) - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("family", ["t5", "t5_gated", "t5_body", "mt5"])
def test_a_network_made_here_exports_as_one_that_says_the_same(family, tmp_path, ours_of):
    net = ours_of(family)
    checkpoint.save(tmp_path, net.params, net.config)
    reference = theirs(tmp_path, "" if family == "t5_body" else "Seq2SeqLM")
    assert np.abs(answer(net) - reference).max() <= 1e-5 * np.abs(reference).max()


def test_one_dropout_rate_is_for_all_places():
    config = families.config_from({**PUBLISHED, "dropout_rate": 0.3})
    for side in (config.encoder, config.decoder):
        assert side.dropout == side.attention_dropout == side.mlp_dropout == 0.3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False is not supported: only the whole network"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"feed_forward_proj": "gelu-gated"}, "feed_forward_proj='gelu-gated' is neither"),
        ({"feed_forward_proj": "gated-mish"}, "dense_act_fn='mish'"),
        ({"d_kv": None}, "d_kv=None must be a whole number"),
        ({"architectures": ["T5EncoderModel"]}, "is not one of T5ForConditionalGeneration, T5Model"),
    ],
)
def test_what_is_not_read_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        families.config_from({**PUBLISHED, **changes})


def test_only_mt5_has_a_start_token_that_need_not_be_said():
    silent = {key: value for key, value in FLAN.items() if key not in ("decoder_start_token_id", "architectures")}
    assert families.config_from(silent).start is None
    assert families.config_from({**silent, "model_type": "mt5"}).start == 0
