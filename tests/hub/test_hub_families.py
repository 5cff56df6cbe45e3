"""config.json of the families, both ways."""

import dataclasses
import logging

import pytest

from tests import checkpoints
from tuning.hub import families, names
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(**changes):
    return families.config_from({key: value for key, value in {**LLAMA, **changes}.items() if value is not ...})


def test_both_layouts_of_the_rotary_numbers_mean_the_same():
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **SCALED}, torch_dtype="bfloat16")
    new = read(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **SCALED}, dtype="bfloat16")
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling == {"rope_type": "llama3", **SCALED}
    assert read(rope_theta=7.0, rope_scaling=None).rope_scaling is None
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_head_dim_is_derived_where_it_is_not_said():
    assert read().head_dim == 8
    assert read(head_dim=None).head_dim == 8
    assert read(head_dim=24).head_dim == 24
    assert read(num_key_value_heads=...).kv_heads == 4


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_absent_keys_mean_what_transformers_means(name):
    """Our reading of a config.json is that of transformers' own class, whose defaults fill in what the file leaves out."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**{**checkpoints.COMMON, **checkpoints.FAMILIES[name]})
    short = {**checkpoints.COMMON, **checkpoints.FAMILIES[name]}
    assert families.config_from(short) == families.config_from(theirs.to_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt5"}, "model_type='gpt5' is not one of llama, mistral"),
        ({"model_type": "qwen"}, "Did you mean qwen"),
        ({"model_type": ...}, "model_type=None"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' needs the numbers factor"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type='ntk'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs the numbers low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": ...}, "hidden_size=None must be a whole number"),
        ({"num_attention_heads": 5}, "multiple of its 5 heads"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"model_type": "qwen3", "architectures": ..., "layer_types": ["linear_attention"] * 3}, "must name one of"),
        ({"model_type": "qwen3", "architectures": ..., "layer_types": ["sliding_attention"] * 3}, "sliding_window says none"),
        ({"architectures": ["LlamaForPoetry"]}, "is not one of LlamaForCausalLM"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        read(**changes)


def test_windows_follow_each_familys_rule():
    def windows(family, **changes):
        return [kind.window for kind in read(model_type=family, architectures=..., **changes).kinds]

    assert windows("mistral") == [4096] * 3
    assert windows("mistral", sliding_window=None) == [None] * 3
    assert windows("mistral", sliding_window=7) == [7] * 3
    for family in ("qwen2", "qwen3"):
        assert windows(family, sliding_window=7) == [None] * 3
        assert windows(family, sliding_window=7, use_sliding_window=True) == [None] * 3  # the first 28 layers have none
        assert windows(family, sliding_window=7, use_sliding_window=True, max_window_layers=2) == [None, None, 7]


def test_keys_that_name_code_are_ignored_and_reported(caplog):
    with caplog.at_level(logging.WARNING):
        assert read(auto_map={"AutoModel": "evil.Model"}) == read()
    assert "auto_map" in caplog.text and "ignored" in caplog.text


SMALL = TransformerConfig(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, max_length=64)
WINDOW = (Kind(window=9),) * 2


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALED}, "tied": True}, "llama"),
        ({"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}, "llama"),
        ({"kinds": WINDOW}, "mistral"),
        ({"width": 36, "heads": 8, "head_dim": 6}, "mistral"),
        ({"attention_bias": True}, "qwen2"),
        ({"attention_bias": True, "kinds": (Kind(), Kind(window=9))}, "qwen2"),
        ({"qk_norm": "head", "kinds": WINDOW}, "qwen3"),
        ({"dtype": "bfloat16", "remat": "full"}, "llama"),
    ],
)
def test_the_first_family_that_can_express_a_network_is_chosen(changes, family):
    config = dataclasses.replace(SMALL, **changes)
    raw = families.config_to(config, bos=5, eos=(6, 7), pad=0)
    assert raw["model_type"] == family
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (5, [6, 7], 0)
    assert families.architecture(families.config_from(raw)) == families.architecture(config)


def test_a_network_that_no_family_can_express_is_refused():
    with pytest.raises(ValueError, match=r"None of llama, mistral, .* can express"):
        families.config_to(dataclasses.replace(SMALL, mlp_bias=True, qk_norm="head"))


def test_the_original_config_keeps_its_keys():
    original = {**LLAMA, "torch_dtype": "float16", "pretraining_tp": 1, "a_key_of_theirs": [1]}
    config = families.config_from(original)
    assert families.config_to(config, original, dtype="bfloat16") == {
        **original, "torch_dtype": "bfloat16",
    }  # fmt: skip
    grown = families.config_to(dataclasses.replace(config, vocab_size=103, rope_theta=1e6), original, dtype="float16")
    assert grown["vocab_size"] == 103 and families.config_from(grown).rope_theta == 1e6
    assert grown["a_key_of_theirs"] == [1]
    with pytest.raises(ValueError, match="no longer a llama"):
        families.config_to(dataclasses.replace(config, qk_norm="head"), original)


def test_every_leaf_of_a_stack_has_its_tensors_by_layer():
    table = families.FAMILIES["llama"].table
    place = names.place("blocks/2-3/attn/q/kernel", (2, 32, 16), table)
    assert place.tensors == ("model.layers.2.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight")
    assert place.lead == (2,) and place.transposed
    assert names.file_shape((2, 32, 16), place) == (16, 32)
    for wrong in ("blocks/0-3/attn/x/kernel", "attn/q/kernel", "blocks/0-3/embed/table"):
        with pytest.raises(ValueError, match=wrong):
            names.place(wrong, (4, 8, 8), table)
