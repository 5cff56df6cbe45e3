"""What is particular to Gemma 1, 2 and 3."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning.hub import checkpoint, families
from tuning.nn import norm
from tuning.nn.block import Kind

SCALED = {"rope_type": "linear", "factor": 8.0}


def read(kind, **changes):
    raw = {**checkpoints.COMMON, "model_type": kind, **changes}
    return families.config_from({key: value for key, value in raw.items() if value is not ...})


def test_both_layouts_of_gemma3s_rotary_numbers_mean_the_same():
    old = read("gemma3_text", rope_theta=5e5, rope_local_base_freq=50.0, rope_scaling=SCALED)
    both = {"full_attention": {"rope_theta": 5e5, **SCALED}, "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"}}
    assert old == read("gemma3_text", rope_parameters=both)
    assert (old.rope_theta, old.local_theta, old.rope_scaling) == (5e5, 50.0, SCALED)
    plain = read("gemma3_text")
    assert (plain.rope_theta, plain.local_theta, plain.rope_scaling) == (1e6, 1e4, None)


def test_layers_are_local_and_global_by_each_familys_pattern():
    def kinds(kind, **changes):
        return read(kind, num_hidden_layers=7, sliding_window=9, **changes).kinds

    near, far = Kind(9, "local"), Kind()
    assert kinds("gemma") == (far,) * 7
    assert kinds("gemma2") == (Kind(9), far, Kind(9), far, Kind(9), far, Kind(9))
    assert kinds("gemma3_text") == (*(near,) * 5, far, near)
    assert kinds("gemma3_text", sliding_window_pattern=3) == (near, near, far, near, near, far, near)
    types = ["full_attention", *["sliding_attention"] * 6]
    assert kinds("gemma3_text", sliding_window_pattern=3, layer_types=types) == (far, *(near,) * 6)


def test_an_explicit_null_means_no_soft_cap_and_absence_the_familys_own():
    def caps(kind, **changes):
        config = read(kind, **changes)
        return config.softcap, config.head.softcap

    none = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert caps("gemma") == caps("gemma3_text") == caps("gemma2", **none) == (0, 0)
    assert caps("gemma2") == (50, 30)
    assert caps("gemma2", architectures=["Gemma2ForTokenClassification"]) == (50, 0)


def test_gelu_is_the_approximation_in_the_first_familys_files_and_exact_in_later_ones():
    assert read("gemma", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh").activation == "gelu_tanh"
    assert read("gemma2", hidden_act="silu").activation == "gelu_tanh"  # a key that it does not have
    assert read("gemma2", hidden_activation="gelu").activation == "gelu"


def test_a_norms_scale_that_is_kept_in_bfloat16_loses_nothing_when_one_is_added():
    scale, x = jnp.full(4, 0.01, jnp.bfloat16), jnp.ones((2, 4))
    said = norm.normalise("rms_plus_one", 0.0, x, scale, None)
    assert np.allclose(said, 1 + float(scale[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        *((kind, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True") for kind in ("gemma", "gemma2", "gemma3_text")),
        *((kind, {"num_attention_heads": 5}, "must be a multiple of its 5 heads") for kind in ("gemma2", "gemma3_text")),
        *((kind, {"sliding_window": None}, "sliding_window says none") for kind in ("gemma2", "gemma3_text")),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu"}, "hidden_act='silu' and hidden_activation='gelu' differ"),
        ("gemma", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"rope_parameters": SCALED}, "must have the keys full_attention and sliding_attention"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": SCALED}}, "may only have a rope_theta"),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, "is not one of Gemma3ForCausalLM"),
    ],
)
def test_what_the_network_cannot_do_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        read(kind, **changes)


def test_the_text_model_of_a_multimodal_gemma3_loads_and_goes_out_alone(tmp_path, ours, caplog):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
    text = {**checkpoints.COMMON, "head_dim": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=99)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    tokens = checkpoints.tokens(2, 12, 90)
    with torch.no_grad():
        reference = model(torch.tensor(tokens)).logits.numpy()
    net = ours(tmp_path / "in")
    assert "text model alone" in caplog.text
    assert abs(net.logits(tokens) - reference).max() <= 1e-5 * max(1, abs(reference).max())
    checkpoint.save(tmp_path / "out", net.params, net.config, original=net.raw)
    with torch.no_grad():
        again = checkpoints.reference(tmp_path / "out")(torch.tensor(tokens)).logits.numpy()
    assert abs(again - reference).max() <= 1e-5 * max(1, abs(reference).max())
