"""Searching for a plan: what is found fits, is the best of all there are, and is said in flags that a run accepts."""

import itertools
import json
import math
import shlex

import pytest

from tests.plan import plans
from tuning import build
from tuning.cli import flags
from tuning.core.chips import CHIPS
from tuning.hub import known
from tuning.plan import cost, memory, search, topology, variants
from tuning.plan.speed import Prices
from tuning.plan.variants import Variants, divisors, meshes_for, room

LAYOUT = ("mesh.", "train.accumulate", "model.remat")
MIB = plans.MIB


def big(path, **sections):
    """A run of a published model."""
    model = dict(path=path, dtype="bfloat16", remat="full")
    made = {
        "model": model, "method": dict(name="lora", rank=16), "data": dict(train=dict(length=4096)), "mesh": dict(data=1, fsdp=-1),
        "train": dict(batch_size=64),
    }  # fmt: skip
    return {**made, **sections}


def everything(run, where, remats=("none", "dots", "full")):
    """(rank, bytes, changes) of every layout there is, each estimated by itself."""
    made = []
    for mesh, remat in itertools.product(meshes_for(run.parts(search.undivided(where), where), where), remats):
        rows = math.prod(mesh[f"mesh.{axis}"] for axis in ("dcn", "data", "fsdp", "expert"))
        for microbatches in divisors(run.config["train"]["batch_size"] // rows):
            changes = {**mesh, "model.remat": remat, "train.accumulate": microbatches}
            parts = run.parts(changes, where)
            rank = cost.hardware_flops_per_token(parts), 0, cost.exchanged_bytes(parts)
            made.append((rank, memory.estimate(parts).total, changes))
    return sorted(made, key=lambda one: one[0])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_found_is_the_best_of_all_that_fit(tmp_path, method):
    run = Variants(plans.config(tmp_path / "model", rows=2, method=dict(name=method)))
    every = everything(run, plans.devices(2, 1))
    sizes = sorted(size for _, size, _ in every)
    for size in (sizes[-1], sizes[len(sizes) // 2], sizes[0]):
        where = plans.devices(2, (size + 1024) / variants.MARGIN / MIB)
        best = next(rank for rank, there, _ in every if there <= room(where))
        found = search.search(run, where, count=1).candidates[0]
        assert (found.hardware_flops_per_token, 0, found.exchanged_bytes) == best
        assert found.memory.total <= room(where)
    assert search.search(run, plans.devices(2, (sizes[0] - 1024) / variants.MARGIN / MIB)).candidates == []


def test_what_is_gathered_of_shards_that_are_no_whole_tiles_is_there_twice(tmp_path):
    run = Variants(plans.config(tmp_path / "model", rows=32, mesh=dict(data=1, fsdp=-1)))  # of width 256
    times = lambda chip, count: memory.gathered(run.parts({}, plans.devices(count, 1000, chip)))  # noqa: E731
    assert [times("v5e", 1), times("v5e", 16), times("v5e", 32), times("v5p", 32), times("h100", 32)] == [0, 1, 2, 1, 1]
    used = {chip: memory.estimate(run.parts({}, plans.devices(32, 1000, chip))) for chip in ("v5e", "v5p")}
    assert used["v5e"].temporaries > used["v5p"].temporaries


def test_a_candidate_is_the_plan_of_its_flags_and_leaves_the_results_alone(tmp_path):
    config = plans.config(tmp_path / "model", train=dict(batch_size=4, accumulate=2), mesh=dict(data=1, fsdp=-1))
    where = plans.devices(2, 60)
    found = search.search(config, where, count=2)
    assert len(found.candidates) == 2 and not found.refused
    for candidate in found.candidates:
        _, overrides, rest = flags.split(shlex.split(" ".join(candidate.flags)))
        parts = build.parts(flags.merge(config, overrides), sketch=where.absent)
        assert not rest and memory.estimate(parts).total == candidate.memory.total
        assert cost.hardware_flops_per_token(parts) == candidate.hardware_flops_per_token
        assert all(key.startswith(LAYOUT) for key in candidate.changes) and candidate.alters == []


def test_layouts_share_their_traces_and_say_what_each_would_alone(tmp_path):
    for name, published, method in (("b", plans.LLAMA, "full"), ("c", plans.MIXTRAL, "lora")):
        run, where = Variants(plans.config(tmp_path / name, published, rows=4, method=dict(name=method))), plans.devices(4, 1000)
        made = [run.parts(mesh, where) for mesh in meshes_for(run.parts(search.undivided(where), where), where)]
        assert [run.memory(parts).total for parts in made] == [memory.estimate(parts).total for parts in made]
        assert all(run.least(parts) == run.memory(parts) for parts in made)
        assert run.traces == len(made) if method == "full" else run.traces < len(made)


def test_what_does_not_fit_without_its_temporaries_is_not_traced(tmp_path):
    run = Variants(plans.config(tmp_path / "model"))
    found = search.search(run, plans.devices(4, 0.5))
    assert found.candidates == [] and run.traces == 0
    assert "weights" in found.refused["h100:4"] and "of 0.00 GiB" in found.refused["h100:4"]


def test_a_real_model_on_a_pod_takes_few_traces():
    run = Variants(big("meta-llama/Llama-3.1-8B", train=dict(batch_size=256)))
    best = search.search(run, topology.parse("v5e:16x16")).candidates[0]
    assert run.traces < 30
    assert best.memory.total <= room(topology.parse("v5e:16x16")) and best.times.seconds_per_step is None
    assert "no throughput" in best.times.sources["hours"]


def test_tensor_divides_the_heads_and_stays_on_a_host_and_expert_is_for_experts(tmp_path):
    dense = Variants(plans.config(tmp_path / "dense", plans.LLAMA | dict(num_attention_heads=16), rows=64))
    odd = Variants(
        plans.config(tmp_path / "odd", plans.LLAMA | dict(hidden_size=192, num_attention_heads=6, num_key_value_heads=6), rows=64)
    )
    routed = Variants(plans.config(tmp_path / "routed", plans.MIXTRAL, rows=64))
    where = plans.devices(64, 1000)
    sizes = {}
    for name, run in (("dense", dense), ("odd", odd), ("routed", routed)):
        made = meshes_for(run.parts(search.undivided(where), where), where)
        assert all(math.prod(mesh.values()) == 64 for mesh in made)
        assert len({tuple(mesh.items()) for mesh in made}) == len(made)
        sizes[name] = {axis: {mesh[f"mesh.{axis}"] for mesh in made} for axis in ("tensor", "expert", "data", "fsdp")}
    assert sizes["dense"]["tensor"] == {1, 2, 4, 8} and sizes["odd"]["tensor"] == {1, 2}
    assert sizes["dense"]["expert"] == {1} and sizes["routed"]["expert"] == {1, 2, 4}
    assert sizes["dense"]["data"] == sizes["dense"]["fsdp"] == set(divisors(64))


def test_a_batch_that_no_mesh_splits_is_said_to_be_one(tmp_path):
    found = search.search(plans.config(tmp_path / "model", rows=4), plans.devices(64, 1000))
    assert "train.batch_size=4 rows cannot be split over 64 devices" in found.refused["h100:64"]
    assert "a multiple of 64" in found.refused["h100:64"]


def test_kernels_are_quantised_only_where_that_is_allowed_and_they_do_not_learn(tmp_path):
    config = plans.config(tmp_path / "model", plans.LLAMA | dict(num_hidden_layers=16, intermediate_size=2048), rows=1)
    run = Variants(config)
    sizes = [run.memory(run.parts({"model.remat": "full", "model.quantise": kind}, plans.devices(1, 1))).total for kind in ("", "nf4")]
    where = plans.devices(1, sum(sizes) / 2 / variants.MARGIN / MIB)
    assert sizes[1] < sizes[0] and search.search(run, where).candidates == []
    best = search.search(run, where, storages=("nf4",)).candidates[0]
    assert best.changes["model.quantise"] == "nf4" and "nf4" in best.alters[0] and "remat=none takes" in best.why
    full = search.search({**config, "method": dict(name="full")}, plans.devices(1, 10_000), storages=("int8", "nf4")).candidates
    assert full and all("model.quantise" not in c.changes and c.alters == [] for c in full)
    roomy = search.search(run, plans.devices(1, 10_000), storages=("nf4",)).candidates[0]
    assert roomy.alters == [] and roomy.why.endswith("nothing faster is known")


def test_another_optimizer_is_taken_only_where_that_is_allowed_and_keeps_its_schedule(tmp_path):
    optimizer = dict(name="adamw", learning_rate=3e-4, schedule=dict(name="cosine", warmup_steps=2))
    run = Variants(plans.config(tmp_path / "model", rows=1, method=dict(name="full"), optimizer=optimizer))
    smaller = run.optimizer("adafactor")
    sizes = [run.memory(run.parts({"model.remat": "full", **more}, plans.devices(1, 1))).total for more in ({}, smaller)]
    where = plans.devices(1, sum(sizes) / 2 / variants.MARGIN / MIB)
    assert search.search(run, where).candidates == []
    best = search.search(run, where, optimizers=("adafactor",)).candidates[0]
    assert "adafactor" in best.alters[0]
    _, overrides, _ = flags.split(shlex.split(" ".join(best.flags)))
    config = build.resolve(flags.merge(run.given, overrides))["optimizer"]
    assert (config["name"], config["learning_rate"], config["schedule"]["warmup_steps"]) == ("adafactor", 3e-4, 2)
    assert "optimizer.learning_rate" not in run.optimizer("sgd")  # whose steps are of another size


def test_the_smallest_is_the_first_of_its_kind_that_fits(tmp_path):
    run = Variants(plans.config(tmp_path / "model", plans.LLAMA | dict(num_hidden_layers=16), rows=8, mesh=dict(data=1, fsdp=-1)))
    need = [search.search(run, plans.devices(n, 1000), count=1).candidates[0].memory.total for n in (1, 2)]
    assert need[1] < need[0]
    places = [plans.devices(n, 1000 if n > 2 else 1) for n in (4, 1, 2, 8)]
    found = search.search(run, places, "smallest")
    assert [c.topology for c in found.candidates] == ["h100:4"] and list(found.refused) == ["h100:1", "h100:2"]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_sizes_of_a_chip_are_topologies_each_twice_the_last(chip):
    devices = [place.devices for place in search.ladder(CHIPS[chip])]
    assert devices == [devices[0] * 2**n for n in range(len(devices))]


def test_the_cheapest_needs_prices_and_says_which_are_missing(tmp_path):
    config = big("meta-llama/Llama-3.1-8B", train=dict(batch_size=8))
    places = [topology.parse(name) for name in ("h100:8", "h200:8", "h100:4")]
    with pytest.raises(ValueError, match="--prices"):
        search.search(config, places, "cheapest")
    prices = Prices("prices.json", "2026-01-31", "EUR", {"h100": 2.0, "h200": 3.0})
    found = search.search(config, places, "cheapest", prices=prices)
    assert {c.topology for c in found.candidates} == {"h100:8", "h100:4"}
    costs = [c.times.cost for c in found.candidates]
    assert costs == sorted(costs) and costs[0] > 0
    assert "h200" in found.refused["h200:8"] and "cost unknown" in found.refused["h200:8"]
    none = search.search(config, places[:1], "cheapest", prices=Prices("prices.json", None, None, {"h100": None}))
    assert none.candidates == [] and "no price for h100" in none.refused["h100:8"]


@pytest.mark.parametrize("goal", ["", "best"])
def test_a_goal_that_there_is_not_and_a_device_of_unknown_memory_are_refused(tmp_path, goal):
    with pytest.raises(ValueError, match="fastest, smallest, cheapest"):
        search.search(plans.config(tmp_path / "model"), plans.devices(1, 1), goal)
    with pytest.raises(ValueError, match="not on file"):
        search.search(plans.config(tmp_path / "model"), topology.Topology("a:1", None, 1))


def parts_of(config, name):
    return build.parts(config, sketch=topology.parse(name).absent)


def test_what_is_computed_again_is_the_layers_or_their_attention():
    parts = parts_of(big("meta-llama/Llama-3.1-8B", method=dict(name="ia3")), "h100:8")
    c = known.config("meta-llama/Llama-3.1-8B")
    attention = 2 * c["num_hidden_layers"] * 4096 * c["hidden_size"]
    again = {policy: cost.recomputed_per_token(parts, policy) for policy in ("none", "dots", "full")}
    assert again == {"none": 0, "dots": attention, "full": pytest.approx(2 * 6_979_321_856 + attention)}
    assert cost.hardware_flops_per_token(parts) == cost.flops_per_token(parts) + again["full"]


def test_what_is_exchanged_is_the_weights_for_each_microbatch_and_the_rows_for_each_layer(tmp_path):
    def exchanged(count, microbatches=1, **mesh):
        config = plans.config(tmp_path / "model", mesh=mesh, train=dict(accumulate=microbatches), method=dict(name="tokens", ids=(1,)))
        return cost.exchanged_bytes(build.parts(config, sketch=plans.devices(count, 1).absent))

    head, layers = 256 * 1000, 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    split = 2 * (2 * head + layers + 9 * 256)  # bytes of what fsdp splits: embedding, head and kernels, in bfloat16, and norms if so
    row = 256 * 4  # of the token that learns, in float32
    assert exchanged(1) == 0
    for microbatches in (1, 2):
        total = exchanged(4, microbatches, data=1, fsdp=4)
        assert total == pytest.approx(microbatches * 0.75 * (2 * split + 3 * row), rel=3e-3)
    assert exchanged(4, data=4) == pytest.approx(1.5 * row)
    hidden = 8 * 512 * 256 * 2
    assert exchanged(2, data=1, tensor=2) == pytest.approx(4 * 4 * hidden, rel=1e-3)


def test_a_plan_of_one_topology_is_no_plan_of_another(tmp_path):
    """What was built for one mesh is taken over for another, but never its layout."""
    config = plans.config(tmp_path / "model", mesh=dict(data=-1, fsdp=1))
    one = build.parts(config, sketch=plans.devices(1, 1).absent)
    four = build.parts(config, like=one, sketch=plans.devices(4, 1).absent)
    assert four.model.mesh.size == 4 and four.model.network is one.model.network
    fresh = build.parts(config, sketch=plans.devices(4, 1).absent)
    assert repr(four.model.layout) == repr(fresh.model.layout)


def test_the_70b_question():
    """In bfloat16 LoRA of 70B does not fit one H200, in 4 bits it does; not even in 4 bits do the weights fit a card of 24 GB."""
    config = big("meta-llama/Llama-3.3-70B-Instruct", train=dict(batch_size=1))
    h200, card = topology.parse("h200:1"), topology.parse("rtx4090:1")
    run = Variants(config)
    held = run.least(run.parts({}, h200))
    assert held.weights / 2**30 == pytest.approx(131.4, abs=0.1) and run.traces == 0
    assert search.search(run, h200).candidates == [] and run.traces == 0
    best = search.search(run, h200, storages=("nf4",), count=1).candidates[0]
    assert best.changes["model.quantise"] == "nf4" and best.memory.weights < 40 * 2**30
    traced = run.traces
    for kind in ("int8", "int4", "nf4"):
        assert run.least(run.parts({"model.quantise": kind}, card)).weights > card.memory_bytes
    assert search.search(run, card, storages=("int8", "int4", "nf4")).candidates == [] and run.traces == traced


def test_candidates_are_plain_enough_for_json(tmp_path):
    found = search.search(plans.config(tmp_path / "model"), plans.devices(1, 1000))
    said = json.dumps([vars(c) | {"memory": vars(c.memory), "times": vars(c.times), "flags": c.flags} for c in found.candidates])
    assert json.loads(said)[0]["changes"] == found.candidates[0].changes
