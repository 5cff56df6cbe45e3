"""Partial tuning's groups of leaves and layers in the trees of published models, and the paces of full and partial tuning."""

import dataclasses
from pathlib import Path

import pytest

from tests import runs, tiny
from tuning import build
from tuning.core import tree
from tuning.methods import METHODS
from tuning.methods.full import full
from tuning.methods.method import Pace
from tuning.methods.partial import PARTS, partial
from tuning.nn.sites import Outline
from tuning.nn.stack import apart, counted_layers

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.txt"))


def outline(file):
    """What a method may know of a model, from its golden tree."""
    names = tuple(line.split()[0] for line in file.read_text().splitlines())
    return Outline(max(span.stop for name in names if (span := counted_layers(name))), (), names)


def family(name):
    return outline(next(file for file in GOLDEN if file.stem == name))


def learned(model, **settings):
    method = partial(model, **settings)
    return {name for name in model.leaves if method.tuned(name)}


# What stands in each group, by hand: names without layers.
GROUPS = {
    "mistral": {
        "embeddings": "embed/table",
        "norms": "attn_norm/scale mlp_norm/scale norm/scale",
        "head": "head/kernel",
    },
    "gpt2": {
        "embeddings": "embed/table positions/table",
        "norms": "attn_norm/bias attn_norm/scale mlp_norm/bias mlp_norm/scale norm/bias norm/scale",
        "biases": "attn/o/bias attn/qkv/bias attn_norm/bias mlp/down/bias mlp/up/bias mlp_norm/bias norm/bias",
    },
    "bert_masked": {
        "embeddings": "embed/table positions/table types/table",
        "norms": "attn_norm/bias attn_norm/scale mlp_norm/bias mlp_norm/scale embed_norm/bias embed_norm/scale "
        "head/norm/bias head/norm/scale",
        "biases": "attn/k/bias attn/o/bias attn/q/bias attn/v/bias attn_norm/bias mlp/down/bias mlp/up/bias mlp_norm/bias embed_norm/bias "
        "head/bias head/dense/bias head/norm/bias",
        "head": "head/bias head/dense/bias head/dense/kernel head/norm/bias head/norm/scale",
    },
    "t5": {
        "embeddings": "embed/table encoder/relative/table decoder/relative/table",
        "norms": "encoder/attn_norm/scale encoder/mlp_norm/scale encoder/norm/scale decoder/attn_norm/scale decoder/cross_norm/scale "
        "decoder/mlp_norm/scale decoder/norm/scale",
    },
}


@pytest.mark.parametrize("name", GROUPS)
def test_each_part_is_these_leaves_and_no_others(name):
    model = family(name)
    for part in PARTS:
        if part in GROUPS[name]:
            assert {apart(leaf)[0] for leaf in learned(model, parts=(part,))} == set(GROUPS[name][part].split()), part
        else:
            with pytest.raises(ValueError, match=f"method.parts: '{part}' matches no leaf"):
                partial(model, parts=(part,))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_parts_leave_nothing_but_the_matrices_of_the_layers(file):
    model = outline(file)
    known = [part for part, pattern in PARTS.items() if any(tree.matches(pattern, name) for name in model.leaves)]
    rest = set(model.leaves) - learned(model, parts=tuple(known))
    assert all("blocks/" in name and name.endswith("/kernel") for name in rest)
    assert not any("blocks/" in name and name.endswith("/kernel") for name in set(model.leaves) - rest)


def test_layers_and_parts_and_names_add_up_and_the_stack_is_cut_at_both_ends():
    method = partial(tiny.outline(), layers=(1, 3), parts=("head",), leaves="^blocks/0-3/attn_norm")
    names = set(tree.flatten(tiny.build(cuts=method.cuts).abstract))
    assert {name.split("/")[1] for name in names if name.startswith("blocks/")} == {"0-0", "1-2", "3-3"}
    expected = {name for name in names if name.startswith(("head/", "blocks/1-2/")) or "/attn_norm/" in name}
    assert {name for name in names if method.tuned(name)} == expected
    last, same = (partial(tiny.outline(), **settings) for settings in ({"last_layers": 2}, {"layers": (2, 4)}))
    names = set(tree.flatten(tiny.build(cuts=last.cuts).abstract))
    assert last.cuts == same.cuts and all(last.tuned(name) == same.tuned(name) == ("blocks/2-3/" in name) for name in names)


def test_the_layers_of_an_encoder_decoder_are_its_decoders():
    chosen = learned(family("t5"), layers=(0, 2))
    assert chosen and all(name.startswith("decoder/blocks/") for name in chosen)


def test_a_name_that_fits_some_of_the_stacked_layers_only_is_refused():
    kinds = Outline(4, (), ("blocks/0-2x2/attn/q/kernel", "blocks/1-3x2/attn/q/kernel"))
    method = partial(kinds, leaves="0-2x2")
    assert method.tuned("blocks/2-2/attn/q/kernel") and not method.tuned("blocks/3-3/attn/q/kernel")
    with pytest.raises(ValueError, match="'0-2x2' matches some layers of blocks/2-3/attn/q/kernel only"):
        method.tuned("blocks/2-3/attn/q/kernel")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("norm",)}, "'norm' is not one of embeddings, norms, biases, head"),
        ({"parts": ("norms", "biases")}, "'biases' matches no leaf"),
        ({"layers": (2, 2)}, r"layers=\(2, 2\) .* has 4 layers"),
        ({"layers": (3, 1)}, r"layers=\(3, 1\)"),
        ({"layers": (0, 5)}, r"layers=\(0, 5\)"),
        ({"layers": (1,)}, r"layers=\(1,\)"),
        ({"last_layers": 1, "layer_decay": 0.0}, "layer_decay=0.0"),
        ({"last_layers": 1, "layer_decay": 1.5}, "layer_decay=1.5"),
        ({"last_layers": 1, "unfreeze_every": -1}, "unfreeze_every=-1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        partial(tiny.outline(), **settings)


def test_the_head_of_a_tied_model_is_no_part_of_its_own():
    with pytest.raises(ValueError, match=r"'head' matches no leaf\. This model has none, or its head is tied to embed/table"):
        partial(tiny.outline(dataclasses.replace(tiny.CONFIG, tied=True)), parts=("head",))


def test_without_the_two_keys_every_leaf_learns_at_the_full_rate_from_the_start():
    for method in (full(tiny.outline()), partial(tiny.outline(), last_layers=2)):
        for rate, begin in map(method.pace, tiny.outline().leaves):
            assert {rate, begin} == {1.0, 0} or (set(rate), set(begin)) == ({1.0}, {0})


def test_rates_fall_and_stages_follow_from_the_head_down():
    pace = full(tiny.outline(), layer_decay=0.5, unfreeze_every=10).pace
    assert pace("head/kernel") == pace("norm/scale") == Pace(1.0, 0)
    assert pace("blocks/0-3/attn/q/kernel") == Pace((1 / 16, 1 / 8, 1 / 4, 1 / 2), (30, 20, 10, 0))
    assert pace("blocks/1-3x2/attn/q/kernel") == Pace((1 / 8, 1 / 2), (20, 0))
    assert pace("embed/table") == pace("positions/table") == pace("embed_norm/scale") == Pace(1 / 32, 40)


def test_an_encoder_learns_after_its_decoder_and_more_slowly():
    pace = full(family("t5"), layer_decay=0.5, unfreeze_every=10).pace
    assert pace("decoder/norm/scale") == Pace(1.0, 0)
    assert pace("decoder/blocks/0-1/cross/q/kernel") == Pace((1 / 4, 1 / 2), (10, 0))
    assert pace("encoder/norm/scale") == Pace(1 / 4, 10)
    assert pace("encoder/blocks/0-2/attn/q/kernel") == Pace((1 / 32, 1 / 16, 1 / 8), (40, 30, 20))
    assert pace("embed/table") == pace("encoder/relative/table") == pace("decoder/relative/table") == Pace(1 / 64, 50)


def test_the_stages_of_partial_tuning_are_those_in_which_something_begins():
    pace = partial(tiny.outline(), layers=(0, 2), parts=("embeddings",), layer_decay=0.5, unfreeze_every=10).pace
    assert pace("blocks/0-1/attn/q/kernel") == Pace((1 / 16, 1 / 8), (10, 0)) and pace("embed/table") == Pace(1 / 32, 20)
    ends = partial(tiny.outline(), parts=("head", "embeddings"), unfreeze_every=10).pace
    assert ends("head/kernel") == Pace(1.0, 0) and ends("embed/table") == Pace(1.0, 10)


def test_rates_by_rule_multiply_those_of_the_method_and_the_first_rule_counts(home):
    def pace(leaf, **method):
        return build.parts(runs.config(home, method=method)).model.pace(leaf)

    full = dict(name="full", layer_decay=0.5, rates=("^norm/=10", "attn/q=2", "attn/=3", "attn/q=7", "attn/q=2"))
    assert pace("norm/scale", **full) == Pace(10.0, 0) and pace("embed/table", **full) == Pace(1 / 8, 0)
    assert pace("blocks/0-1/attn/q/kernel", **full) == Pace((1 / 2, 1.0), (0, 0))
    assert pace("blocks/0-1/attn/o/kernel", **full) == Pace((3 / 4, 3 / 2), (0, 0))
    for leaf in "ab":
        name = f"blocks/0-1/attn/q/adapter/{leaf}"
        assert pace(name, name="lora", b_rate=16.0) == pace(name, name="lora", rates=("/b$=16",)) == Pace(16.0 if leaf == "b" else 1.0)
    config = runs.config(home, method=dict(name="lora", rates=("^embed/added=5",)), model__added_tokens=("<new>",))
    assert build.parts(config).model.pace("embed/added") == Pace(5.0)  # what is new starts at once, and goes by the rules too


@pytest.mark.parametrize("entry", ["^head/", "^head/=0", "^head/=-1", "^head/=fast", "=2", "^head/=inf"])
def test_a_rate_that_is_none_is_refused(entry):
    with pytest.raises(ValueError, match="is not a regular expression and a positive factor; write for example"):
        METHODS["full"](tiny.outline(), rates=(entry,))


def test_a_rate_of_what_does_not_learn_is_refused(home):
    config = runs.config(home, method=dict(name="lora", rates=("^head/=10",)))
    with pytest.raises(ValueError, match=r"method.rates: '\^head/' matches no leaf that learns. There are: .*adapter/a"):
        build.parts(config)
