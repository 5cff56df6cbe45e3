"""Thirty updates in torch, transformers and peft, and the same thirty here; experiments/torch_parity is the long version."""

import json

import numpy as np
import pytest

from experiments.torch_parity import run as parity

pytest.importorskip("peft")

STEPS = 30


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from threads, which wait for one another on a busy machine."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sums in words, long and short, as rows of a question and an answer."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        numbers = rng.integers(1, 50, rng.integers(2, 6)).tolist()
        rows.append(dict(question=f"What is {' plus '.join(map(str, numbers))}?", answer=f"It is {sum(numbers)}."))
    path = tmp_path_factory.mktemp("sums") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint_of(data, tmp_path_factory):
    def write(tied):
        rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
        directory = tmp_path_factory.mktemp("checkpoint")
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
        parity.write_checkpoint(directory, [text for row in rows for text in row.values()], vocab_size=300, tied=tied, **sizes)
        return directory

    return write


@pytest.mark.parametrize(
    ("method", "pack", "tied"),
    [
        ("lora", True, False), ("lora", False, True), ("full", True, True), ("full", False, False), ("dora", True, True),
        ("ia3", True, False), ("prompt", False, True), ("prefix", False, False),
    ],
)  # fmt: skip
def test_thirty_updates_have_the_losses_that_torch_has(checkpoint_of, data, method, pack, tied, tmp_path):
    run = parity.config(checkpoint_of(tied), data, method=method, pack=pack, steps=STEPS, length=64)
    mine, torchs = parity.compare(run)
    gaps = parity.differences(mine, torchs)
    assert len(gaps) == STEPS
    assert [(number, gap) for number, gap in enumerate(gaps, 1) if not gap <= parity.bound(number)] == []
    np.testing.assert_allclose([a.grad_norm for a in mine], [b.grad_norm for b in torchs], rtol=1e-4)
    # Both would agree if nothing learned, or if nothing were clipped.
    if method in ("ia3", "prompt", "prefix"):  # which do little to random weights
        run["optimizer"]["learning_rate"] = 0.0
        still, _ = parity.ours(run, tmp_path)
        assert max(abs(a.loss - b.loss) for a, b in zip(mine, still, strict=True)) > 0.01
    else:
        assert mine[-1].loss < mine[0].loss - 0.1
        assert max(a.grad_norm for a in mine) > run["train"]["clip_norm"]


def test_a_difference_out_of_bounds_is_seen(capsys):
    torchs = [parity.Update(2.0, 1.0)] * 12
    off = lambda step, gap: [parity.Update(2.0 * (1 + gap * (n == step)), 1.0) for n in range(1, 13)]  # noqa: E731
    assert parity.report("same", torchs, torchs)
    assert parity.report("first, inside", off(1, 0.9e-5), torchs)
    assert not parity.report("first", off(1, 1.1e-5), torchs)
    assert not parity.report("tenth", off(10, 1.1e-4), torchs)
    assert parity.report("eleventh, inside", off(11, 0.9e-3), torchs)
    assert not parity.report("not a number", off(12, float("nan")), torchs)
    assert "too far" in capsys.readouterr().out
