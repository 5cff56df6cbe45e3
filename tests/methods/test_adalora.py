"""AdaLoRA against PEFT and torch, update by update; stopped and gone on; split over a mesh; and what it refuses."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tuning
from tests import checkpoints, runs, tiny
from tests.test_train import Crash, crash_at
from tuning import build, weights
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch, Mean
from tuning.methods import METHODS
from tuning.methods.adalora import Budget, lowest
from tuning.nn import stack
from tuning.objectives import OBJECTIVES
from tuning.source import pretrained
from tuning.training import state, step, writer
from tuning.training.optimizer import OPTIMIZERS, SCHEDULES

STEPS, CLIP = 16, 0.5
METHOD = dict(init_rank=4, target_rank=2, alpha=64.0, warmup_steps=3, final_steps=5, every=2, beta1=0.8, beta2=0.7, orthogonal=0.3)
OPTIMIZER = dict(learning_rate=2e-2, weight_decay=0.1, decay=".*")


class Update(NamedTuple):
    """The loss (with the penalty) before an update, the gradient's norm before clipping, and which entries of e are 0 after it."""

    loss: float
    grad_norm: float
    zeros: dict[tuple[str, int], list[bool]]  # by role and layer

    @property
    def count(self):
        return sum(map(sum, self.zeros.values()))


def batch_of(number):
    tokens = np.random.default_rng(number % 2).integers(3, 100, (8, 24)).astype(np.int32)
    ones, weights = np.ones_like(tokens), np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return Batch(tokens, np.roll(tokens, -1, 1), weights, ones, np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.tiny("llama2", tmp_path_factory.mktemp("llama"), num_hidden_layers=2, initializer_range=0.1)


def ours(folder, **sizes):
    """(updates, leaves that learn before them, state after them) of a run on a mesh."""
    where = meshes.over(jax.devices()[: math.prod(sizes.values())], **sizes)
    with jax.set_mesh(where):
        source = pretrained(path=str(folder))
        method = METHODS["adalora"](build.outline(source), **METHOD)
        m = build.model(source, method, where)
        transform = method.around(STEPS)(OPTIMIZERS["adamw"](SCHEDULES["linear"](STEPS, warmup_steps=1), **OPTIMIZER).transform)
        now = state.start(weights.start_params(m, 0), m.tuned, transform, where)
        start, updates, loss = jax.device_get(now.tuned), [], OBJECTIVES["next_token"]()
        batches = [jax.device_put(batch_of(i), meshes.rows(where)) for i in range(STEPS)]
        made = step.train_step(m.network.apply, loss, transform, accumulate=1, clip_norm=CLIP, seed=0, penalty=method.penalty)
        compiled = step.jit(made, now, batches[0])
        for batch in batches:
            now, means = compiled(now, batch)
            said = {name: float(mean.value) for name, mean in means.items()}
            updates.append(Update(said["loss"] + said["penalty"], said["grad_norm"], zeros(now.tuned)))
        return updates, tree.flatten(start), now


def zeros(tuned):
    found = {}
    for name, leaf in tree.flatten(tuned).items():
        if name.endswith("/e"):
            role, layers = stack.apart(name.removesuffix("/adapter/e"))
            found |= {(role, i): (row == 0).tolist() for i, row in zip(layers, np.asarray(leaf), strict=True)}
    return found


@pytest.fixture(scope="module")
def straight(folder):
    return ours(folder, data=1)


def theirs(folder, start):
    """The same updates by torch, transformers and peft, from the same leaves."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    said = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=64, tinit=3, tfinal=5, deltaT=2, beta1=0.8, beta2=0.7, orth_reg_weight=0.3, total_step=STEPS,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(checkpoints.reference(folder), said).train()
    places = {}
    for name, leaf in start.items():
        place, _, which = name.rpartition("/adapter/")
        role, layers = stack.apart(place)
        for i, value in zip(layers, leaf, strict=True):
            block, (room, last) = model.base_model.model.model.layers[i], role.split("/")
            module = places[role, i] = getattr(block.self_attn if room == "attn" else block.mlp, f"{last}_proj")
            with torch.no_grad():
                getattr(module, f"lora_{which.upper()}")["default"].copy_(torch.tensor(value[:, None] if which == "e" else value.T))
    learns = [p for p in model.parameters() if p.requires_grad]
    assert len(learns) == 3 * len(places) == 3 * 7 * 2
    optimizer = torch.optim.AdamW(learns, lr=OPTIMIZER["learning_rate"], weight_decay=OPTIMIZER["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda made: 0.0 if made < 1 else 1 - (made - 1) / (STEPS - 1))
    updates = []
    for i in range(STEPS):
        tokens = torch.tensor(batch_of(i).tokens).long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learns, CLIP)
        optimizer.step()
        schedule.step()
        model.base_model.update_and_allocate(i)
        optimizer.zero_grad()
        zero = {place: (module.lora_E["default"] == 0).ravel().tolist() for place, module in places.items()}
        updates.append(Update(loss.item(), norm.item(), zero))
    return updates


def test_every_update_is_the_one_that_peft_makes(folder, straight):
    mine, start, _ = straight
    torchs = theirs(folder, start)
    np.testing.assert_allclose([a.loss for a in mine], [b.loss for b in torchs], rtol=1e-5)
    np.testing.assert_allclose([a.grad_norm for a in mine], [b.grad_norm for b in torchs], rtol=1e-4)
    assert [a.zeros for a in mine] == [b.zeros for b in torchs]
    # Nothing was moved by the first update, at a rate of 0; then as many as are due at the updates 4, 6, 8, 10 and from 11 on.
    assert [a.count for a in mine] == [56, 0, 0, 0, 10, 0, 22, 0, 27, 0, 28, 28, 28, 28, 28, 28]
    assert {0, 4} < {sum(row) for row in mine[-1].zeros.values()}  # some sites keep all, and some nothing
    assert mine[-1].loss < mine[0].loss - 0.5 and min(a.grad_norm for a in mine) < CLIP < max(a.grad_norm for a in mine)


def test_random_gradients_prune_what_they_prune_in_peft():
    """Random ones, so that what is important changes from update to update."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    said = dict(init_r=5, target_r=2, tinit=2, tfinal=9, deltaT=3, beta1=0.4, beta2=0.3, total_step=30)
    layers = {f"{role}{i}": torch.nn.Linear(*size) for role, size in {"q": (6, 4), "v": (5, 7)}.items() for i in (0, 1)}
    model = peft.get_peft_model(torch.nn.ModuleDict(layers), peft.AdaLoraConfig(target_modules=list(layers), **said))

    def there(name):
        _, _, _, role, _, which = name.split("/")
        return [getattr(model.base_model.model[f"{role}{i}"], f"lora_{which.upper()}")["default"] for i in (0, 1)]

    def here(name):
        return np.stack([x.detach().numpy().squeeze(1) if name.endswith("e") else x.detach().numpy().T for x in there(name)])

    names = [f"blocks/0-1/attn/{role}/adapter/{which}" for role in "qv" for which in "aeb"]
    leaves = tree.unflatten({name: jnp.array(here(name)) for name in names})
    settings = dict(init_rank=5, target_rank=2, warmup_steps=2, final_steps=9, every=3, beta1=0.4, beta2=0.3)
    transform = METHODS["adalora"](tiny.outline(), **settings).around(30)(optax.sgd(0.1))
    now, update, rng, seen = transform.init(leaves), jax.jit(transform.update), np.random.default_rng(0), []
    for number in range(30):
        slopes = {name: rng.normal(size=here(name).shape).astype(np.float32) for name in names}
        updates, now = update(tree.unflatten(slopes), now, leaves)
        leaves = optax.apply_updates(leaves, updates)
        for name, slope in slopes.items():
            for x, row in zip(there(name), slope, strict=True):
                x.grad = torch.tensor(row.T.reshape(x.shape))
                x.data -= 0.1 * x.grad
        model.base_model.update_and_allocate(number)
        for name, x in tree.flatten(leaves).items():
            np.testing.assert_allclose(x, here(name), atol=1e-6)
            np.testing.assert_array_equal(x == 0, here(name) == 0)
        seen.append(zeros(leaves))
    counts = [sum(map(sum, found.values())) for found in seen]
    assert [number for number, count in enumerate(counts) if count] == [3, 6, 9, 12, 15, 18, *range(21, 30)] and counts[-1] == 4 * 3
    assert all(found == seen[-1] for found in seen[21:]) and seen[18] != seen[21]


def test_a_mesh_prunes_what_one_device_prunes(folder, straight):
    mine, _, now = ours(folder, fsdp=2, tensor=2)
    np.testing.assert_allclose([a.loss for a in mine], [b.loss for b in straight[0]], rtol=1e-5)
    assert [a.zeros for a in mine] == [b.zeros for b in straight[0]]
    leaves = tree.flatten(now.tuned)
    for averages in (now.optimizer.sensitivity, now.optimizer.uncertainty):
        for name, x in tree.flatten(averages).items():
            assert x.sharding == leaves[name].sharding and x.sharding.is_fully_replicated == name.endswith("/e")


def test_a_run_that_was_killed_prunes_as_if_it_had_not_been(home, tmp_path, monkeypatch, whole):
    for number in (4, 7):
        with monkeypatch.context() as patch:
            crash_at(number, patch)
            with pytest.raises(Crash):
                tuning.train(whole[0], tmp_path)
    tuning.train(whole[0], tmp_path)
    assert writer.comparable(tmp_path / "metrics.jsonl") == writer.comparable(whole[1] / "metrics.jsonl")
    one, two = (tree.flatten(tuning.load(path).params) for path in (tmp_path, whole[1]))
    assert all(np.array_equal(one[name], x) for name, x in two.items())


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """(config, directory) of a run that nothing disturbed: it prunes at updates 2 to 5, and stays as it is at the last three."""
    method = dict(name="adalora", init_rank=4, target_rank=2, warmup_steps=1, final_steps=3, targets=("q", "v"), dropout=0.1)
    config = runs.config(home, method=method, train__steps=8, eval={"every": 0})
    path = tmp_path_factory.mktemp("whole")
    tuning.train(config, path)
    lines = [line for line in writer.read(path / "metrics.jsonl") if "train/loss" in line]
    assert len({line["train/penalty"] for line in lines}) == 8 and min(line["train/penalty"] for line in lines) > 0
    assert sum(map(sum, zeros(tuning.load(path).params).values())) == 2 * 2 * 2
    return config, path


PLACE = "blocks/0-1/attn/q/adapter"
SMALL = METHODS["adalora"](tiny.outline(), init_rank=3, target_rank=1, warmup_steps=0, final_steps=1)


def leaves_of(a, e, b):
    return tree.unflatten({f"{PLACE}/a": a, f"{PLACE}/e": e, f"{PLACE}/b": b})


def apply(params, batch, key):
    """A network of one number."""
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(params)), None, {}


def loss(forward, batch, base=None):
    off = forward(batch)[0] - batch.tokens / 67
    return {"loss": Mean((batch.weights * off**2).sum(), batch.weights.sum())}


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return leaves_of(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 3), (2, 3), (2, 3, 6))))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_lowered_is_the_mean_loss_and_the_penalty(drawn, accumulate):
    batch, still = tiny.batch(), {"norm": jnp.float32(1)}
    made = step.train_step(apply, loss, optax.sgd(1.0), accumulate=accumulate, clip_norm=0, seed=0, penalty=SMALL.penalty)
    after, means = jax.jit(made)(state.TrainState(jnp.int32(0), drawn, still, optax.sgd(1.0).init(drawn)), batch)

    def total(tuned):
        return loss(lambda piece: apply(tree.merge(tuned, still), piece, None), batch)["loss"].value + SMALL.penalty(tuned)

    expected = jax.tree.map(lambda x, slope: x - slope, drawn, jax.jit(jax.grad(total))(drawn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.tuned, expected)
    np.testing.assert_allclose(means["penalty"].value, SMALL.penalty(drawn), rtol=1e-6)
    assert len({float(weight) for weight in batch.weights.reshape(2, 4, -1).sum((0, 2))}) > 1  # the microbatches weigh differently


def test_a_step_that_is_not_finite_changes_no_average(drawn):
    transform, fine, broken = SMALL.around(4)(optax.adam(0.1)), {"norm": jnp.float32(1)}, {"norm": jnp.float32(jnp.nan)}
    made = step.train_step(apply, loss, transform, accumulate=1, clip_norm=1, seed=0, penalty=SMALL.penalty)
    run = jax.jit(made)
    one, means = run(state.TrainState(jnp.int32(0), drawn, fine, transform.init(drawn)), tiny.batch())
    assert float(means["finite"].total) == 1 and all(x.all() for x in jax.tree.leaves(one.optimizer.uncertainty))
    two, means = run(state.TrainState(one.step, one.tuned, broken, one.optimizer), tiny.batch())
    assert float(means["finite"].total) == 0 and int(two.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (two.tuned, two.optimizer), (one.tuned, one.optimizer))


def test_factors_that_are_orthogonal_cost_nothing_and_have_a_slope_of_zero():
    leaves = leaves_of(jnp.eye(5, 3)[None], jnp.ones((1, 3)), 2 * jnp.eye(3, 6)[None])
    value, slope = jax.jit(jax.value_and_grad(SMALL.penalty))(leaves)
    np.testing.assert_allclose(value, 0.5 * (0 + 3 * 3**0.5) / 2, rtol=1e-6)
    slope = tree.flatten(slope)
    assert not slope[f"{PLACE}/a"].any() and np.isfinite(slope[f"{PLACE}/b"]).all() and slope[f"{PLACE}/b"].any()


def test_outputs_gradients_and_folded_kernels_are_pefts():
    peft = pytest.importorskip("peft")
    from tests.methods.test_lowrank import SITES, Layers, adapters, near, tensor, twin
    from tuning.nn.dropout import dropout

    torch, key = pytest.importorskip("torch"), jax.random.key(3)
    mine = Layers("adalora", init_rank=5, target_rank=2, alpha=6.0, dropout=0.4)
    layers = twin(mine, peft.AdaLoraConfig, dict(init_r=5, target_r=2, lora_alpha=6, lora_dropout=0.4, total_step=9))
    params = mine.moved()
    folded = tree.flatten(mine.method.fold(params))
    for site in SITES:
        layer, own = layers[site.role], adapters(params, site.role)
        for name, value in own.items():
            with torch.no_grad():
                getattr(layer, f"lora_{name.upper()}")["default"].copy_(tensor(value[:, None] if name == "e" else value.T))

        class Same(torch.nn.Module):  # drops what ours drops
            def forward(self, x):
                return tensor(dropout(jnp.asarray(x.numpy()), 0.4, key))

        layer.lora_dropout["default"] = Same()
        x, seen = (np.random.default_rng(i).normal(size=(5, size)).astype(np.float32) for i, size in enumerate(site.shape))
        y = layer.train()(tensor(x))
        near(mine.apply(site.role, params, x, key), y)
        assert np.abs(mine.apply(site.role, params, x, key) - mine.apply(site.role, params, x)).max() > 0.05
        (y * tensor(seen)).sum().backward()
        slope = jax.grad(lambda p, site=site, x=x, seen=seen: (mine.apply(site.role, p, x, key) * seen).sum())(params)
        for name, value in adapters(slope, site.role).items():
            near(value[:, None] if name == "e" else value.T, getattr(layer, f"lora_{name.upper()}")["default"].grad)
        layer.merge()
        near(folded[f"{site.role}/kernel"][0].T, layer.base_layer.weight, 1e-6)


@pytest.mark.parametrize(("warmup", "final", "every", "steps"), [(0, 1, 1, 40), (3, 5, 2, 16), (7, 20, 3, 101), (10, 11, 100, 22)])
def test_as_many_are_zeroed_as_peft_zeroes(warmup, final, every, steps):
    RankAllocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    theirs = RankAllocator.__new__(RankAllocator)
    theirs.peft_config = SimpleNamespace(tinit=warmup, tfinal=final, total_step=steps, deltaT=every)
    theirs.init_bgt, theirs.target_bgt = 12 * 7, 5 * 7
    mine = Budget(12, 5, warmup, final, every, 0.5, 0.5).zeroed(steps, 12 * 7)
    assert len(mine) == steps - final + 1 and mine[-1] == 7 * 7
    for i, count in enumerate(mine):
        budget, masks = theirs.budget_schedule(i)
        assert count == (12 * 7 - budget if masks or i == steps - final else 0)


def test_the_steps_follow_from_the_length_of_the_run_where_they_are_not_given():
    counts = Budget(12, 8, None, None, 1, 0.5, 0.5).zeroed(100, 12)
    assert next(i for i, count in enumerate(counts) if count) == 11 and len(counts) == 68


def test_the_lowest_scores_are_counted_over_all_sites_and_ties_go_together():
    scores = {"a": jnp.array([[3.0, 0.0], [1.0, 1.0]]), "b": jnp.array([[2.0, 5.0]])}
    found = [float(jax.jit(lowest)(scores, count)) for count in range(7)]
    assert found == [-1, 0, 1, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_rank": 0}, "less than method.init_rank=0"),
        ({"target_rank": 13}, "target_rank=13 must be at least 1 and less than method.init_rank=12"),
        ({"target_rank": 12}, "target_rank=12"),
        ({"target_rank": 0}, "target_rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"every": 0}, "every=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_steps": 0}, "final_steps=0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": 0.0}, "beta2=0.0"),
        ({"orthogonal": -0.1}, "orthogonal=-0.1"),
        ({"targets": ("qkv",)}, "'qkv' matches no site"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS["adalora"](tiny.outline(), **settings)


@pytest.mark.parametrize(("warmup", "final", "steps"), [(4, 4, 8), (0, 8, 8), (None, None, 1)])
def test_a_run_too_short_to_prune_in_is_refused_before_anything_is_compiled(home, warmup, final, steps):
    method = {"name": "adalora", "warmup_steps": warmup, "final_steps": final}
    with pytest.raises(ValueError, match=rf"leave no update to shrink the budget in: train\.steps={steps}"):
        build.parts(runs.config(home, method=method, train__steps=steps, optimizer__schedule={"name": "constant"}))


def test_without_a_weight_there_is_no_penalty_to_report():
    assert METHODS["adalora"](tiny.outline(), orthogonal=0.0).penalty is None
