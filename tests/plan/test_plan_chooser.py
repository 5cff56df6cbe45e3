"""What can be tuned on a device, and what to change about a run that does not fit."""

import shlex

import pytest

from tests.plan import plans
from tuning.cli import flags
from tuning.methods import METHODS
from tuning.plan import chooser, memory, remedies, topology, variants
from tuning.plan.remedies import KINDS, LITTLE, OTHER, SAME
from tuning.plan.variants import Variants, room


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    run = Variants(plans.config(tmp_path_factory.mktemp("a") / "model", rows=4))
    return {row.name: row for row in chooser.choose(run, plans.devices(1, 1000), tokens=20 * 512 * 4 - 1)}


def test_every_method_has_a_row_with_all_of_its_figures(table):
    assert {*METHODS, *chooser.VARIATIONS} == set(table)
    for row in table.values():
        assert row.reason == "" and row.fits and row.memory.total > 0 and row.trainable > 0 and 0 < row.relative_flops <= 1.05
        assert row.steps == 20  # the last one is not full


def test_the_rows_are_ordered_as_they_must_be(table):
    total = {name: row.memory.total for name, row in table.items()}
    assert total["lora over nf4"] < total["lora over int8"] < total["lora"] < total["full, adafactor"] < total["full"]
    assert table["full"].relative_flops == 1 and table["partial"].relative_flops <= 1
    # What learns and two moments of it in float32, and a counter or two.
    for name in ("lora", "full"):
        assert table[name].checkpoint_bytes == pytest.approx(12 * table[name].trainable, abs=64)
    assert table["full, adafactor"].checkpoint_bytes < table["full"].checkpoint_bytes / 2


def test_a_method_that_is_not_for_the_model_says_why_and_the_others_stand(tmp_path):
    published = dict(
        model_type="t5", vocab_size=1000, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    run = Variants(plans.config(tmp_path / "model", published, rows=1))
    listed = [(name, changes) for name, changes in chooser.listed(run) if name in ("prefix", "ia3")]
    rows = {name: chooser.row(run, plans.devices(1, 1000), name, changes, 1, None) for name, changes in listed}
    assert "rotary" in rows["prefix"].reason and rows["prefix"].memory is None and rows["prefix"].fits is None
    assert rows["ia3"].fits and not rows["ia3"].reason


def test_data_are_given_once(tmp_path):
    with pytest.raises(ValueError, match="examples=3 and tokens=4"):
        chooser.choose(plans.config(tmp_path / "model"), plans.devices(1, 1000), examples=3, tokens=4)


def between(run, first, second):
    """A device on which the second changes fit, and the first do not."""
    sizes = [run.memory(run.parts(changes, plans.devices(1, 1))).total for changes in (first, second)]
    assert sizes[1] < sizes[0]
    return plans.devices(1, sum(sizes) / 2 / variants.MARGIN / plans.MIB)


def test_a_run_that_fits_needs_no_remedy(tmp_path):
    found = remedies.remedies(plans.config(tmp_path / "model", rows=1), plans.devices(1, 1000))
    assert found.fits and found.found == [] and found.otherwise == ""


def test_single_changes_come_first_the_cheapest_before_the_others_and_each_suffices(tmp_path):
    config = plans.config(tmp_path / "model", rows=4)
    run = Variants(config)
    where = between(run, {"train.accumulate": 1}, {"train.accumulate": 2})
    found = remedies.remedies(run, where)
    assert not found.fits and found.memory.total > room(where)
    kinds = [remedy.kinds for remedy in found.found]
    assert kinds[:2] == [("microbatches",), ("rematerialisation",)]
    assert kinds == sorted(kinds, key=lambda kind: list(KINDS).index(kind[0]))
    assert found.found[0].changes == {"train.accumulate": 2} and found.found[0].flops == 1 and found.found[0].results == SAME
    sizes = {policy: run.memory(run.parts({"model.remat": policy}, where)).total for policy in ("dots", "full")}
    assert found.found[1].changes == {"model.remat": next(policy for policy, size in sizes.items() if size <= room(where))}
    assert found.found[1].flops > 1
    for remedy in found.found:
        _, overrides, _ = flags.split(shlex.split(" ".join(remedy.flags)))
        parts = variants.Variants(flags.merge(config, overrides)).parts({}, where)
        assert memory.estimate(parts).total == remedy.memory.total <= room(where)
        assert remedy.results == KINDS[remedy.kinds[0]]


def test_where_no_single_change_is_enough_several_are_and_none_of_them_is_idle(tmp_path):
    run = Variants(plans.config(tmp_path / "model", rows=4))
    both = {"train.accumulate": 4, "model.remat": "full"}
    size = run.memory(run.parts(both, plans.devices(1, 1))).total
    where = plans.devices(1, (size + 2**16) / variants.MARGIN / plans.MIB)
    (found,) = remedies.remedies(run, where).found
    assert found.kinds == ("microbatches", "rematerialisation") and found.changes == both and found.results == SAME
    for key in found.changes:
        less = {other: value for other, value in found.changes.items() if other != key}
        assert not run.fits(run.parts(less, where), where)


def test_what_fits_nowhere_here_is_sent_where_it_does(tmp_path):
    nowhere = remedies.remedies(plans.config(tmp_path / "model", rows=1), plans.devices(1, 0.5))
    assert not nowhere.fits and nowhere.found == []
    assert nowhere.otherwise.startswith("nothing here fits; the smallest that does: h100:1")


def test_70b_in_bfloat16_on_one_h200_is_refused_and_quantising_is_the_remedy():
    config = {
        "model": dict(path="meta-llama/Llama-3.3-70B-Instruct", dtype="bfloat16", remat="full"), "method": dict(name="lora", rank=16),
        "data": dict(train=dict(length=4096)), "train": dict(batch_size=16, accumulate=16),
    }  # fmt: skip
    found = remedies.remedies(config, topology.parse("h200:1"))
    assert not found.fits and found.memory.weights > 131 * 2**30
    assert [(remedy.kinds, remedy.results) for remedy in found.found] == [(("storage",), LITTLE)]
    assert OTHER not in {remedy.results for remedy in found.found}
