"""The order of batches: a pure function of the seed and the step, the same on every mesh, resumed by setting one number."""

import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from tuning.core import mesh as meshes
from tuning.core.types import Batch, Inputs
from tuning.data.loader import AHEAD, Loader, abstract, once, place, prefetch


class Numbered:
    """Row i is all i, so that a batch shows which rows it holds."""

    length = 4

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    @property
    def abstract(self):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Numbered.__getitem__(self, 0))

    def __getitem__(self, index):
        assert 0 <= index < self.count
        ints = np.full(self.length, index, np.int32)
        return Batch(ints, ints + 1, np.ones(self.length, np.float32), np.ones(self.length, np.int32), np.arange(4, dtype=np.int32))


class Sided(Numbered):
    """The same with token types, and with an encoder's tokens of another length."""

    @property
    def abstract(self):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self[0])

    def __getitem__(self, index):
        row = super().__getitem__(index)
        read = np.full(6, 100 + index, np.int32)
        return dataclasses.replace(row, types=row.tokens + 50, inputs=Inputs(read, np.ones(6, np.int32), np.arange(6, dtype=np.int32)))


@pytest.fixture
def mesh():
    return meshes.mesh(data=4, fsdp=2)


def loader(mesh, count=20, **options):
    return Loader(Numbered(count), **{"batch_size": 8, "seed": 3, "mesh": mesh, **options})


def ids(batch):
    return np.asarray(batch.tokens)[:, 0].tolist()


def take(stream, count):
    return [ids(batch) for batch in itertools.islice(stream, count)]


def flat(batches):
    return [*itertools.chain.from_iterable(batches)]


def test_every_epoch_holds_every_row_once_and_in_its_own_order(mesh):
    stream = flat(take(loader(mesh), 10))
    epochs = [stream[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_neighbouring_seeds_share_no_epoch(mesh):
    epochs = [tuple(loader(mesh, count=8, seed=seed).indices(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(epochs)) == 16


def test_fewer_rows_than_a_batch_repeat(mesh):
    stream = flat(take(loader(mesh, count=3), 3))
    assert [sorted(stream[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8


def test_without_shuffling_rows_come_in_order(mesh):
    assert take(loader(mesh, shuffle=False), 3) == [[*range(8)], [*range(8, 16)], [16, 17, 18, 19, 0, 1, 2, 3]]


def test_a_batch_is_a_function_of_seed_and_step(mesh):
    straight = take(loader(mesh), 6)
    assert [ids(loader(mesh).batch(step)) for step in reversed(range(6))] == straight[::-1]
    assert take(loader(mesh, seed=4), 6) != straight


@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
def test_resuming_by_seek_equals_going_straight(mesh, step):
    straight, resumed = loader(mesh), loader(mesh)
    straight.seek({"step": step - 1})
    stream = iter(straight)
    next(stream)
    resumed.seek(straight.position())
    assert take(resumed, 4) == take(stream, 4)


def test_position_counts_what_was_taken_and_not_what_was_prepared(mesh):
    data = loader(mesh)
    stream = iter(data)
    assert data.position() == {"step": 0, "batch_size": 8, "seed": 3, "rows": 20}
    for taken in (1, 2, 3):
        next(stream)
        assert data.position()["step"] == taken
    stream.close()
    assert take(data, 2) == [ids(data.batch(3)), ids(data.batch(4))]


def test_seeking_far_costs_nothing(mesh):
    began = time.monotonic()
    data = loader(mesh, count=10_000_000)
    data.seek({"step": 10**9})
    next(iter(data))
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(("key", "value"), [("batch_size", 16), ("seed", 4), ("rows", 21)])
def test_a_position_of_another_stream_is_refused(mesh, key, value):
    with pytest.raises(ValueError, match=f"saved with {key}={value}"):
        loader(mesh).seek({**loader(mesh).position(), key: value})


def test_moving_the_loader_under_an_iterator_is_an_error(mesh):
    data = loader(mesh)
    stream = iter(data)
    next(stream)
    data.seek({"step": 7})
    with pytest.raises(RuntimeError, match="moved to step 7 while it was being read at 1"):
        next(stream)


def test_the_order_is_the_same_on_every_mesh(mesh):
    one = meshes.over(jax.devices()[:1])
    tensor = meshes.mesh(data=2, tensor=4)
    assert take(loader(mesh), 3) == take(loader(one), 3) == take(loader(tensor), 3)


def test_batches_are_global_arrays_split_over_rows(mesh):
    batch = next(iter(loader(mesh, batch_size=16)))
    row = Numbered(20)[int(batch.tokens[5, 0])]
    for name in ("tokens", "targets", "weights", "segments", "positions"):
        array = getattr(batch, name)
        assert array.shape == (16, 4)
        assert array.sharding == meshes.rows(mesh)
        assert [shard.data.shape for shard in array.addressable_shards] == [(2, 4)] * 8
        np.testing.assert_array_equal(array[5], getattr(row, name))
        assert array.dtype == getattr(row, name).dtype


def test_types_and_inputs_travel_where_the_rows_have_them(mesh):
    batch = place(Sided(5), [3, 1, 4, 0, 2, 5, 6, 7], mesh)
    assert np.asarray(batch.types)[:, 0].tolist() == [53, 51, 54, 50, 52, 0, 0, 0]
    assert np.asarray(batch.inputs.tokens)[:, 5].tolist() == [103, 101, 104, 100, 102, 0, 0, 0]
    assert np.asarray(batch.inputs.segments)[:, 0].tolist() == [1] * 5 + [0] * 3
    assert np.asarray(batch.inputs.positions)[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.inputs.tokens.shape == (8, 6) and batch.tokens.shape == batch.types.shape == (8, 4)
    plain = place(Numbered(5), [3, 1, 4, 0, 2, 5, 6, 7], mesh)
    assert plain.types is None and plain.inputs is None
    for leaf in jax.tree.leaves(batch):
        assert leaf.sharding == meshes.rows(mesh)


@pytest.mark.parametrize("rows", [Numbered(20), Sided(20)])
def test_the_abstract_batch_is_that_which_comes(mesh, rows):
    expected = abstract(rows, 16, mesh)
    found = Loader(rows, batch_size=16, seed=0, mesh=mesh).batch(0)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for shape, array in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


def test_each_row_is_built_once(mesh):
    built = []

    class Counting(Numbered):
        def __getitem__(self, index):
            built.append(index)
            return super().__getitem__(index)

    data = Loader(Counting(20), batch_size=8, seed=0, mesh=meshes.mesh(data=2, tensor=4))
    assert sorted(ids(data.batch(0))) == sorted(built)


def test_a_batch_that_the_mesh_cannot_split_is_refused(mesh):
    for make in (loader, lambda mesh, **options: once(Numbered(5), mesh=mesh, **options)):
        for size in (12, 0, -8):
            with pytest.raises(ValueError, match=f"batch_size={size} must be a multiple of 8"):
                make(mesh, batch_size=size)
    with pytest.raises(ValueError, match="has no rows"):
        loader(mesh, count=0)


def test_once_reads_every_row_once_and_fills_up_with_nothing(mesh):
    batches = list(once(Numbered(19), batch_size=8, mesh=mesh))
    assert [ids(batch) for batch in batches] == [[*range(8)], [*range(8, 16)], [16, 17, 18, 0, 0, 0, 0, 0]]
    last = batches[-1]
    assert last.weights[:3].min() == last.segments[:3].min() == 1
    assert last.weights[3:].max() == last.segments[3:].max() == 0
    assert [len(ids(batch)) for batch in once(Numbered(16), batch_size=8, mesh=mesh)] == [8, 8]


# Prefetching.


def test_prefetching_keeps_the_order_and_stays_bounded():
    made = []
    stream = prefetch(lambda i: made.append(i) or i, itertools.count())
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert made == list(range(len(made)))
    assert len(made) <= 5 + AHEAD
    stream.close()


def test_an_error_in_the_thread_reaches_the_reader_at_its_turn():
    def make(i):
        if i == 2:
            raise OSError("the disk is gone")
        return i

    stream = prefetch(make, itertools.count())
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert list(stream) == []


def test_closing_or_forgetting_the_reader_ends_the_thread(mesh):
    alive = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]  # noqa: E731
    stream = iter(loader(mesh))
    next(stream)
    assert alive()
    stream.close()
    assert not alive()
    stream = iter(loader(mesh))
    next(stream)
    del stream
    assert not alive()
