"""Rows of other text among the training rows: evenly, each text in epochs of its own, and resumed by setting one number."""

import dataclasses
import time

import numpy as np
import pytest

from tests.data.test_loader import Numbered, flat, ids, take
from tuning.core import mesh as meshes
from tuning.data.dataset import dataset
from tuning.data.formats import FORMATS
from tuning.data.loader import Loader, place
from tuning.data.mixture import Mixture, replay
from tuning.data.reader import Reader

OTHER = 1000  # what the rows of the other text begin to count from


class Others(Numbered):
    def __getitem__(self, index):
        row = super().__getitem__(index)
        return dataclasses.replace(row, tokens=row.tokens + OTHER)


@pytest.fixture
def mesh():
    return meshes.mesh(data=4, fsdp=2)


def loader(mesh, share=0.25, first=20, other=7, **options):
    rows = Mixture(Numbered(first), Others(other), share)
    return Loader(rows, **{"batch_size": 8, "seed": 3, "mesh": mesh, **options})


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3333, 0.5, 0.95])
def test_every_window_of_a_batchs_size_holds_the_share_to_within_a_row(mesh, share):
    data = loader(mesh, share)
    places = [index >= 20 for step in range(60) for index in data.indices(step)]
    windows = [sum(places[i : i + 8]) for i in range(len(places) - 8)]
    assert max(abs(count - 8 * share) for count in windows) < 1
    assert abs(sum(places) - len(places) * share) < 1


def test_both_texts_are_gone_through_in_shuffled_epochs(mesh):
    stream = flat(take(loader(mesh, first=20, other=20), 40))
    ours, theirs = [i for i in stream if i < OTHER], [i - OTHER for i in stream if i >= OTHER]
    assert len(ours) == 3 * len(theirs)
    orders = [some[i : i + 20] for some in (ours, theirs) for i in range(0, len(some), 20)]
    assert len(orders) == 16 and all(sorted(epoch) == list(range(20)) for epoch in orders)
    assert len({tuple(epoch) for epoch in orders}) == 16  # the texts do not share an order either


def test_training_rows_come_in_the_order_that_they_have_alone(mesh):
    mixed = [i for i in flat(take(loader(mesh), 8)) if i < OTHER]
    alone = flat(take(Loader(Numbered(20), batch_size=8, seed=3, mesh=mesh), 8))
    assert mixed == alone[: len(mixed)] and len(mixed) == 48
    assert [i for i in flat(take(loader(mesh, shuffle=False), 4)) if i >= OTHER] == [OTHER + i % 7 for i in range(8)]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_resuming_by_seek_equals_going_straight(mesh, step):
    straight, resumed = loader(mesh), loader(mesh)
    straight.seek({"step": step - 1})
    stream = iter(straight)
    next(stream)
    resumed.seek(straight.position())
    assert take(resumed, 4) == take(stream, 4) == [ids(loader(mesh).batch(n)) for n in range(step, step + 4)]
    assert resumed.position() == {"step": step + 4, "batch_size": 8, "seed": 3, "rows": 27, "replayed": 7, "share": 0.25}


def test_seeking_far_costs_nothing(mesh):
    began = time.monotonic()
    data = loader(mesh, first=10_000_000, other=3_000_000)
    data.seek({"step": 10**9})
    next(iter(data))
    assert time.monotonic() - began < 3


def test_a_position_of_another_mixture_is_refused(mesh):
    alone = Loader(Numbered(27), batch_size=8, seed=3, mesh=mesh)
    for saved, here, message in (
        (loader(mesh), loader(mesh, 0.2), r"saved with share=0\.25, and here share=0\.2"),
        (loader(mesh), loader(mesh, first=21, other=6), "saved with replayed=7, and here replayed=6"),
        (alone, loader(mesh), "saved with replayed=None"),
        (loader(mesh), alone, "and here replayed=None"),
    ):
        with pytest.raises(ValueError, match=message):
            here.seek(saved.position())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_of_nothing_or_of_all_is_refused(share):
    with pytest.raises(ValueError, match=rf"share={share} .* must lie between 0 and 1"):
        Mixture(Numbered(20), Others(7), share)


def test_rows_of_other_shapes_are_refused():
    class Longer(Numbered):
        length = 6

    with pytest.raises(ValueError, match=r"differ in tokens, .*\. Give both the same kind of format"):
        Mixture(Numbered(20), Longer(7), 0.5)


def test_a_replayed_text_gets_rows_like_those_of_the_training_text(mesh, plain, write):
    reader = Reader(plain)
    first = dataset(
        reader, FORMATS["auto"](), path=write("a.jsonl", [{"prompt": "how many?", "completion": " 12"}] * 9), length=24, pack=False
    )
    other = write("b.jsonl", [{"text": f"the cat sat on mat {i}"} for i in range(5)])
    mixed = replay(reader, FORMATS["auto"](), first, path=other, share=0.1, pack=False)
    alone = dataset(reader, FORMATS["text"](), path=other, length=24, pack=False)
    assert mixed.share == 0.1 and len(mixed) == 14
    for index, row in ((3, first[3]), (9, alone[0]), (13, alone[4])):
        for name in ("tokens", "targets", "weights", "segments", "positions"):
            np.testing.assert_array_equal(getattr(mixed[index], name), getattr(row, name))
    batch = place(mixed, [0, 9, 1, 10, 2, 11, 3, 12], mesh)
    assert batch.tokens.shape == (8, 24) and batch.weights[1].sum() > batch.weights[0].sum()
    with pytest.raises(ValueError, match=r"share=2 "):
        replay(reader, FORMATS["auto"](), first, path=other, share=2)
