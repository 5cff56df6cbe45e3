"""Configs: completed from signatures, checked with suggestions, overridden section by section."""

import pytest

from tuning.core import config as configs
from tuning.core import parts
from tuning.core.config import Section


def lora(outline, *, rank: int = 16, dropout: float = 0.0):
    return ("lora", outline, rank, dropout)


def partial(outline, *, leaves: str = ""):
    return ("partial", outline, leaves)


def rows(*, path: str, length: int = 1024, limit: int | None = None):
    return path, length, limit


SECTIONS = {
    "method": Section({"lora": lora, "partial": partial}, "lora"),
    "data.train": Section({"": rows}),
    "data.eval": Section({"": rows}, inherits="data.train", own=("path",)),
}


def resolve(given):
    return configs.resolve(SECTIONS, given, {"seed": 0})


def test_defaults_come_from_the_signature():
    full = resolve({"method": {"rank": 4}})
    assert full["method"] == {"name": "lora", "rank": 4, "dropout": 0.0}
    assert full["data"]["train"]["length"] == 1024 and full["seed"] == 0


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"method\.rnak.*Did you mean rank"):
        resolve({"method": {"rnak": 4}})
    with pytest.raises(ValueError, match=r"config\.methd.*Did you mean method"):
        resolve({"methd": {}})
    with pytest.raises(ValueError, match=r"data\.trian.*Did you mean train"):
        resolve({"data": {"trian": {}}})


def test_another_tools_key_only_feeds_the_suggestion():
    with pytest.raises(ValueError, match=r"Did you mean method\.rank"):
        resolve({"method": {"lora_r": 4}})


def test_an_unknown_part_is_refused_with_the_table():
    with pytest.raises(ValueError, match=r"method\.name='lorra' is not one of lora, partial.*Did you mean lora"):
        resolve({"method": {"name": "lorra"}})


def test_evaluation_data_takes_what_is_not_set_from_training_data():
    full = resolve({"data": {"train": {"path": "a", "length": 8}, "eval": {"path": "b"}}})
    assert full["data"]["eval"]["length"] == 8 and full["data"]["eval"]["path"] == "b"
    assert isinstance(resolve({"data": {"train": {"path": "a"}}})["data"]["eval"]["path"], parts.Required)


def test_changing_a_name_resets_its_section():
    changed = configs.override(SECTIONS, {"method": {"name": "lora", "rank": 4}}, {"method.leaves": "bias", "method.name": "partial"})
    assert resolve(changed)["method"] == {"name": "partial", "leaves": "bias"}
    same = configs.override(SECTIONS, {"method": {"name": "lora", "rank": 4}}, {"method.name": "lora"})
    assert resolve(same)["method"]["rank"] == 4


def test_a_required_key_without_a_value_is_named_with_its_remedy():
    with pytest.raises(ValueError, match=r"data\.train\.path has no value.*--config\.data\.train\.path=VALUE"):
        configs.bind(SECTIONS, resolve({}), "data.train")
    assert configs.bind(SECTIONS, resolve({"data": {"train": {"path": "a"}}}), "data.train")() == ("a", 1024, None)


def test_kinds_see_through_optional():
    kinds = configs.kinds(SECTIONS, resolve({}))
    assert kinds["data.train.limit"] is int and kinds["method.dropout"] is float and kinds["data.train.path"] is str


def test_the_first_difference_is_named_and_free_keys_do_not_count():
    one, other = resolve({"method": {"rank": 4}}), resolve({"method": {"rank": 8}})
    assert configs.first_difference(one, other, ()) == "method.rank: 4 here, 8 there"
    assert configs.first_difference(one, other, ("method",)) == ""
    assert configs.first_difference({"a": (1, 2)}, {"a": [1, 2]}, ()) == ""
