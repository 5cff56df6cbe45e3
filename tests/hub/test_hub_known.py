"""The configs of models without files: each is a network of the published size, and is read by transformers as the same architecture."""

import functools
import logging

import pytest
import transformers

from tuning.core import tree
from tuning.hub import families, known
from tuning.models import network
from tuning.nn.sites import NOTHING

# All parameters, a tied head once. Where the config names a masked language model, of that: without the pooler.
TOTALS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-27b-pt": 27_432_406_640 - 416_866_032 - (1152 * 5376 + 1152),  # without the tower of images and its projection
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "microsoft/phi-4": 14_659_507_200,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "openai-community/gpt2": 124_439_808,
    "google-bert/bert-base-uncased": 109_514_298,
    "FacebookAI/roberta-base": 124_697_433,
    "google-t5/t5-large": 737_668_096,
    "google/flan-t5-xl": 2_849_757_184,
}
ACTIVE = {"Qwen/Qwen3-30B-A3B": 3.3e9, "mistralai/Mixtral-8x7B-v0.1": 12.9e9}  # published with one digit, cut or rounded


@functools.cache
def shapes(path):
    """(config of the network, {leaf: shape}); no parameter is made."""
    config = families.config_from(known.config(path))
    return config, tree.flatten(network.build(config.construct(NOTHING)).abstract)


def test_every_known_model_is_counted():
    assert set(TOTALS) == set(known.KNOWN)


@pytest.mark.parametrize("path", known.KNOWN)
def test_a_known_model_has_its_published_number_of_parameters(path):
    assert sum(leaf.size for leaf in shapes(path)[1].values()) == TOTALS[path]


@pytest.mark.parametrize("path", ACTIVE)
def test_a_token_passes_through_the_published_number_of_parameters(path):
    config, leaves = shapes(path)
    share = {name: config.per_token / config.experts if leaf.ndim == 4 else 1 for name, leaf in leaves.items()}  # [layers, experts, ...]
    assert any(x < 1 for x in share.values())
    assert sum(share[name] * leaf.size for name, leaf in leaves.items()) == pytest.approx(ACTIVE[path], abs=1e8)


@pytest.mark.parametrize("path", known.KNOWN)
def test_every_key_of_a_known_model_is_one_of_transformers(path):
    """A misspelled key would be passed over in silence, and its default taken."""
    also = {"rope_theta", "rope_scaling", "head_dim", "decoder_start_token_id"}  # read, but not among what a class starts with
    for said in (known.KNOWN[path], known.KNOWN[path].get("text_config")):
        if said:
            theirs = transformers.CONFIG_MAPPING[said["model_type"]]()
            assert set(said) <= {*theirs.to_dict(), *theirs.attribute_map, *also}


@pytest.mark.parametrize("path", known.KNOWN)
def test_a_known_model_is_the_network_that_transformers_reads_from_it(path):
    """What transformers makes of the keys, defaults filled in and written out, is read as the same architecture."""
    raw = dict(known.config(path))
    theirs = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw).to_dict()
    theirs |= {key: raw[key] for key in ("architectures", "tie_word_embeddings") if key in raw}  # its T5 is always tied, and then is not
    assert families.architecture(families.config_from(raw)) == families.architecture(families.config_from(theirs))


def test_the_text_model_is_taken_from_one_that_reads_more():
    assert known.KNOWN["google/gemma-3-27b-pt"]["model_type"] == "gemma3"
    assert known.config("google/gemma-3-27b-pt")["model_type"] == "gemma3_text"


def test_an_unknown_id_has_no_config():
    assert known.config("meta-llama/Llama-3.1-8b") is None and known.config("") is None


def test_nothing_of_a_known_model_is_passed_over(caplog):
    with caplog.at_level(logging.WARNING):
        for path in known.KNOWN:
            families.config_from(known.config(path))
    assert not caplog.records
