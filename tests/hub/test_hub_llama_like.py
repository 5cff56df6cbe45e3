"""What is particular to the configurations of OLMo-2, SmolLM3 and Phi-3."""

import pytest

from tests import checkpoints
from tuning.hub import families
from tuning.nn.block import Kind

LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.0], "long_factor": [2.0, 4.0, 8.0, 9.0]}


def read(kind, **changes):
    raw = {**checkpoints.COMMON, "model_type": kind, **changes}
    return families.config_from({key: value for key, value in raw.items() if value is not ...})


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3s_old_files_mean_what_transformers_means(name):
    from transformers import Phi3Config

    scaling = {**LONG, "type": name, "original_max_position_embeddings": 32}
    old = dict(rope_scaling=scaling, rope_theta=500.0, original_max_position_embeddings=32)
    config = read("phi3", **old)
    assert config == families.config_from(Phi3Config(**checkpoints.COMMON, **old).to_dict())
    assert config.rope_scaling["rope_type"] == "longrope" and config.rope_scaling["long_factor"] == (2.0, 4.0, 8.0, 9.0)


def test_the_length_beside_phi3s_rotary_numbers_goes_before_one_among_them():
    def original(**beside):
        return read("phi3", rope_scaling={**LONG, "original_max_position_embeddings": 7}, **beside).rope_scaling[
            "original_max_position_embeddings"
        ]

    assert original() == 4096
    assert original(original_max_position_embeddings=32) == 32


def test_phi3s_dropout_is_not_of_the_embedding():
    config = read("phi3", resid_pdrop=0.25, embd_pdrop=0.5)
    assert (config.dropout, config.dropped) == (0.25, ("attn", "mlp"))
    assert families.config_from(families.config_to(config)) == config


def test_smollm3_rotates_in_the_layers_that_are_listed_or_in_all_but_every_fourth():
    def kinds(**changes):
        return read("smollm3", num_hidden_layers=5, **changes).kinds

    turned, plain = Kind(), Kind(rope="")
    assert kinds() == (turned, turned, turned, plain, turned)
    assert kinds(no_rope_layer_interval=2) == (turned, plain, turned, plain, turned)
    assert kinds(no_rope_layers=[0, 1, 1, 0, 1, 0, 0]) == (plain, turned, turned, plain, turned)
    window = dict(use_sliding_window=True, sliding_window=9)
    assert kinds(**window) == (turned, turned, turned, Kind(9, ""), turned)
    types = ["sliding_attention", *["full_attention"] * 4]
    assert kinds(**window, layer_types=types) == (Kind(9), turned, turned, plain, turned)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [1.0]}}, "a long_factor with 4 numbers each"),
        ("phi3", {"rope_scaling": {**LONG, "short_factor": ...}}, "needs the numbers short_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "must have a short_factor"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]"),
        ("smollm3", {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, "sliding_window says none"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("olmo2", {"architectures": ["Olmo2ForTokenClassification"]}, "is not one of Olmo2ForCausalLM"),
    ],
)
def test_what_the_network_cannot_do_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        read(kind, **changes)
