"""Cross-entropy over classes: against PyTorch, against counting by hand, and the same packed as apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import tiny
from tuning.core.types import Batch, Mean
from tuning.objectives import OBJECTIVES
from tuning.objectives.labels import labels


def head_of(kernel_DC):
    return jax.tree_util.Partial(_project, kernel_DC)


def _project(kernel, x):
    return jnp.einsum("...d,dc->...c", x, kernel)


def case(C, B=4, T=9, D=16, seed=0):
    """(head's kernel, hidden states, batch); about half of the positions have a label, and the last two are padding."""
    rng = np.random.default_rng(seed)
    segments = np.where(np.arange(T) < T - 2, 1, 0) * np.ones((B, 1), np.int32)
    weights = ((rng.random((B, T)) < 0.5) & (segments > 0)).astype(np.float32)
    targets = rng.integers(0, C, (B, T)).astype(np.int32)
    batch = Batch(targets, targets, weights, segments.astype(np.int32), np.zeros_like(targets))
    kernel, hidden = rng.normal(size=(D, C)).astype(np.float32), rng.normal(size=(B, T, D)).astype(np.float32)
    return jnp.asarray(kernel), jnp.asarray(hidden), batch


def means_of(loss, kernel, hidden, batch):
    return loss(lambda _: (hidden, head_of(kernel), {"balance": Mean(1.0, 2.0)}), batch)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_torch(classes, smoothing, weighted):
    kernel, hidden, batch = case(classes)
    class_weights = (0.5, 2.0, 0.0, 1.0, 3.5)[:classes] if weighted else ()
    loss = labels(label_smoothing=smoothing, class_weights=class_weights)
    value, (d_kernel, d_hidden) = jax.jit(
        jax.value_and_grad(lambda kernel, hidden: means_of(loss, kernel, hidden, batch)["loss"].value, (0, 1))
    )(kernel, hidden)

    kernel_T, hidden_T = (torch.tensor(np.asarray(x), requires_grad=True) for x in (kernel, hidden))
    counts = torch.tensor(batch.weights) > 0
    expected = torch.nn.functional.cross_entropy(
        (hidden_T @ kernel_T)[counts], torch.tensor(batch.targets)[counts].long(), label_smoothing=smoothing,
        weight=torch.tensor(class_weights) if weighted else None,
    )  # fmt: skip
    expected.backward()
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-6)
    for got, want in ((d_kernel, kernel_T.grad), (d_hidden, hidden_T.grad)):
        np.testing.assert_allclose(got, want, atol=1e-6 * max(1, float(want.abs().max())))
    assert not np.asarray(d_hidden)[batch.weights == 0].any()


def test_measures_are_what_one_counts_by_hand():
    kernel, hidden, batch = case(2)
    means = means_of(labels(class_weights=(1.0, 3.0), label_smoothing=0.2), kernel, hidden, batch)
    counts = batch.weights > 0
    logits = (np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64))[counts]
    targets = batch.targets[counts]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logits.argmax(-1)
    true, false, missed = (int(((chosen == a) & (targets == b)).sum()) for a, b in ((1, 1), (1, 0), (0, 1)))
    assert min(true, false, missed) > 0
    assert float(means["nll"].value) == pytest.approx(-log_p[np.arange(len(targets)), targets].mean(), rel=1e-6)
    assert float(means["nll"].weight) == float(means["accuracy"].weight) == counts.sum()
    assert float(means["accuracy"].value) == pytest.approx((chosen == targets).mean())
    assert (float(means["f1"].total), float(means["f1"].weight)) == (2 * true, 2 * true + false + missed)
    assert float(means["loss"].weight) == np.array([1, 3])[targets].sum()
    assert float(means["balance"].value) == 0.5
    assert means_of(labels(), *case(3)).keys() == {"loss", "nll", "accuracy", "balance"}


def test_measures_of_two_batches_add_up_to_those_of_both():
    loss = labels(class_weights=(1.0, 3.0))
    kernel, hidden, batch = case(2)
    halves = [(hidden[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch)) for rows in (slice(0, 1), slice(1, 4))]
    one, two = (means_of(loss, kernel, *half) for half in halves)
    for name, whole in means_of(loss, kernel, hidden, batch).items():
        if name != "balance":
            assert float((one[name] + two[name]).value) == pytest.approx(float(whole.value), rel=1e-6)


def test_targets_without_weight_do_not_count():
    kernel, hidden, batch = case(2)
    for loss in (labels(), labels(label_smoothing=0.1, class_weights=(1.0, 2.0))):
        means = means_of(loss, kernel, hidden, batch)
        odd = np.where(batch.weights > 0, batch.targets, 50_000).astype(np.int32)
        changed = Batch(batch.tokens, odd, batch.weights, batch.segments, batch.positions)
        noisy = hidden + 9 * (batch.weights == 0)[..., None]
        for name, mean in means_of(loss, kernel, noisy, changed).items():
            assert float(mean.total) == float(means[name].total)
            assert float(mean.weight) == float(means[name].weight)


def test_examples_packed_in_a_row_lose_what_they_lose_apart():
    net = tiny.build()
    params, packed = tiny.init(net), tiny.batch()
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 3, packed.tokens.shape).astype(np.int32)
    packed = Batch(packed.tokens, targets, packed.weights, packed.segments, packed.positions)
    length = packed.tokens.shape[1]

    def alone(row, segment):
        inside = packed.segments[row] == segment
        pad = lambda x: np.pad(x[row][inside], (0, length - inside.sum()))  # noqa: E731
        return jax.tree.map(
            pad, Batch(packed.tokens, packed.targets, packed.weights, (packed.segments > 0).astype(np.int32), packed.positions)
        )

    rows = [alone(row, segment) for row in range(len(packed.tokens)) for segment in (1, 2)]
    apart = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
    kernel = jnp.asarray(rng.normal(size=(tiny.CONFIG.width, 3)).astype(np.float32))
    loss = labels(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5))

    @jax.jit
    def means(params, batch):
        return loss(lambda batch: (net.apply(params, batch)[0], head_of(kernel), {}), batch)

    one, other = means(params, packed), means(params, apart)
    for name in one:
        assert float(one[name].value) == pytest.approx(float(other[name].value), rel=1e-5)
        assert float(one[name].weight) == pytest.approx(float(other[name].weight))


def test_it_is_the_objective_called_labels():
    assert OBJECTIVES["labels"] is labels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"objective\.label_smoothing=1\.0"),
        ({"label_smoothing": -0.1}, r"objective\.label_smoothing=-0\.1"),
        ({"class_weights": (1.0, -1.0)}, r"objective\.class_weights=\(1\.0, -1\.0\)"),
        ({"class_weights": (0.0, 0.0)}, "not all zero"),
        ({"class_weights": (1.0, float("nan"))}, "finite"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        labels(**settings)


def test_weights_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers, and the model 3 classes"):
        means_of(labels(class_weights=(1.0, 2.0)), *case(3))
    with pytest.raises(ValueError, match="A head over 1 classes has nothing to tell apart"):
        means_of(labels(), *case(1))
