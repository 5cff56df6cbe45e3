"""GPT-2, GPT-NeoX, Falcon and BLOOM: the spellings of published files, and what is refused."""

import numpy as np
import pytest

from tests import checkpoints
from tuning.hub import checkpoint, families, files

GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {**checkpoints.COMMON, "model_type": "gpt_neox"}
FALCON = {**checkpoints.COMMON, "model_type": "falcon"}
BLOOM = {**checkpoints.COMMON, "model_type": "bloom"}


def gpt2(values):
    """No prefix, each layer's causal mask, and the output repeated."""
    values = {name.removeprefix("transformer."): x for name, x in values.items()}
    masks = {f"h.{i}.attn.{name}": np.ones((1, 1, 128, 128), np.float32) for i in range(3) for name in ("bias", "masked_bias")}
    return {**values, **masks, "lm_head.weight": values["wte.weight"]}


def bloom(values):
    return {name.removeprefix("transformer."): x for name, x in values.items()}


def neox(values):
    kept = {
        "bias": np.tril(np.ones((1, 1, 128, 128), np.uint8)),
        "masked_bias": np.float32(-1e9),
        "rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    return {**values, **{f"gpt_neox.layers.{i}.attention.{name}": np.asarray(x) for i in range(3) for name, x in kept.items()}}


@pytest.mark.parametrize(
    ("family", "respell", "keys"),
    [
        ("gpt2", gpt2, {"n_ctx": 128}),
        ("bloom", bloom, {"n_embed": 48, "num_attention_heads": 6, "hidden_size": ..., "n_head": ..., "offset_alibi": 100}),
        ("neox", neox, {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_parameters": ...}),
    ],
)
def test_a_file_in_the_published_spelling_is_read_and_saved_in_the_usual_one(family, respell, keys, tmp_path, ours, ours_of, checkpoint_of):
    pytest.importorskip("torch")
    held = files.Tensors(checkpoint_of(family))
    values = respell({name: held.read(name) for name in held})
    assert set(values) != set(held)
    files.write(tmp_path / "old", values.items())
    raw = {key: value for key, value in {**ours_of(family).raw, **keys}.items() if value is not ...}
    files.write_json(tmp_path / "old" / "config.json", raw)
    net, tokens = ours(tmp_path / "old"), checkpoints.tokens(2, 12)
    assert net.config == ours_of(family).config
    assert np.array_equal(net.logits(tokens), ours_of(family).logits(tokens))
    checkpoint.save(tmp_path / "new", net.params, net.config, original=net.raw)
    assert set(files.Tensors(tmp_path / "new")) == set(held)
    checkpoints.reference(tmp_path / "new")  # raises if a tensor is missing or unknown


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"resid_pdrop": 0.2}, "embd_pdrop=0.1 and resid_pdrop=0.2 must be the same"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, "is not one of GPT2LMHeadModel"),
        (NEOX, {"rotary_pct": 0.0}, "rotary_pct=0.0"),
        (FALCON, {"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        (FALCON, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (FALCON, {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=False"),
        (FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        (FALCON, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3"),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        (BLOOM, {"slow_but_exact": True}, "slow_but_exact=True"),
    ],
)
def test_what_the_network_cannot_do_is_refused(raw, changes, said):
    families.config_from(raw)
    with pytest.raises(ValueError, match=said):
        families.config_from({**raw, **changes})


@pytest.mark.parametrize(
    ("raw", "changes", "dropped"),
    [
        (GPT2, {}, ("embed", "attn", "mlp")),
        (GPT2, {"resid_pdrop": 0.0}, ("embed",)),
        (GPT2, {"embd_pdrop": 0.0}, ("attn", "mlp")),
        (BLOOM, {"hidden_dropout": 0.1}, ("attn", "mlp")),
        (NEOX, {"hidden_dropout": 0.1}, ("embed", "attn", "mlp")),
    ],
)
def test_dropout_is_where_the_family_has_it(raw, changes, dropped):
    config = families.config_from({**raw, **changes})
    assert config.dropout == 0.1 and config.dropped == dropped
    assert families.config_from(families.config_to(config)) == config


@pytest.mark.parametrize(
    ("head", "name"), [("none", "GPT2Model"), ("language_model", "GPT2LMHeadModel"), ("question_answering", "GPT2ForQuestionAnswering")]
)
def test_another_head_is_found_by_its_class(head, name):
    assert families.with_head(GPT2, head, ())["architectures"] == [name]


@pytest.mark.parametrize("changes", [{}, {"classifier_dropout": 0.2}, {"hidden_dropout": 0.3}])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "falcon", "bloom"])
def test_a_token_classifier_drops_as_much_as_in_transformers(model_type, changes):
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForTokenClassification

    if model_type == "falcon":
        changes = {key: rate for key, rate in changes.items() if key != "hidden_dropout"}  # refused
    theirs = AutoModelForTokenClassification.from_config(AutoConfig.for_model(model_type, **checkpoints.COMMON, **changes))
    raw = {**checkpoints.COMMON, **changes, "model_type": model_type, "architectures": [type(theirs).__name__]}
    head = families.config_from(raw).head
    assert head.output == "classes" and head.dropout == theirs.dropout.p
    assert families.config_from(families.config_to(families.config_from(raw))).head == head
