"""Batches in a reproducible order: which rows make batch n follows from (seed, n) alone, so that resuming is a matter of setting n.

The rows are shuffled anew in every epoch, and the stream of epochs is cut into batches; a batch may span two epochs. In a mixture each text
has epochs of its own. Every process builds the rows that its own devices hold, and the order does not depend on how many there are.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from tuning.core import mesh as meshes
from tuning.core.types import Batch
from tuning.data.mixture import Mixture, Order

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # batches that are made before they are asked for


class RowSource(Protocol):
    """Rows by index: each a Batch of numpy arrays, all alike."""

    @property
    def abstract(self) -> Batch: ...  # shape and dtype of a row, as jax.ShapeDtypeStruct
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Batch: ...


class Loader:
    """An endless stream of batches. Iterating goes on from `position()`; one iterator at a time.

    ValueError if batch_size is not a multiple of the pieces that the mesh splits a batch into.
    """

    def __init__(self, rows: RowSource | Mixture, *, batch_size: int, seed: int, mesh: Mesh, shuffle: bool = True):
        _check(rows, batch_size, mesh)
        self._rows, self._mesh = rows, mesh
        self._size, self._step = batch_size, 0
        self._settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "rows": len(rows)}
        epochs = functools.partial(_epochs, seed=seed) if shuffle else lambda count, text=0: lambda place: place % count
        if isinstance(rows, Mixture):
            self._settings |= {"replayed": len(rows.other), "share": rows.share}
            self._order = rows.order(epochs(len(rows.first)), epochs(len(rows.other), text=1))
        else:
            self._order = epochs(len(rows))

    def indices(self, step: int) -> np.ndarray:
        """Which rows make a batch; steps count from 0."""
        return np.array([self._order(place) for place in range(step * self._size, (step + 1) * self._size)])

    def batch(self, step: int) -> Batch:
        """The global batch of a step: arrays [batch_size, length], sharded over their first axis."""
        return place(self._rows, self.indices(step), self._mesh)

    def position(self) -> dict[str, Any]:
        """Where the stream is: `step` batches were handed out (what was only prepared does not count); and what that number depends on."""
        return {"step": self._step, **self._settings}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes to a position, at no cost. ValueError if it belongs to another stream; one that is a `step` alone belongs to any."""
        saved = {key: value for key, value in position.items() if key != "step"}
        for key in saved and {**self._settings, **saved}:
            if saved.get(key) != self._settings.get(key):
                raise ValueError(
                    f"The data position was saved with {key}={saved.get(key)}, and here {key}={self._settings.get(key)}: the stream is "
                    f"another one. Use the same data and settings, or begin a new run."
                )
        self._step = int(position["step"])

    def __iter__(self) -> Generator[Batch]:
        for step, batch in prefetch(lambda step: (step, self.batch(step)), itertools.count(self._step)):
            if step != self._step:
                raise RuntimeError(f"The loader was moved to step {self._step} while it was being read at {step}. Begin a new iterator.")
            self._step = step + 1
            yield batch


def once(rows: RowSource, *, batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Every row once, in order. The last batch is filled up with rows of weight 0 and segment 0. ValueError as for Loader."""
    _check(rows, batch_size, mesh)
    starts = range(0, len(rows), batch_size)
    return prefetch(lambda start: place(rows, np.arange(start, start + batch_size), mesh), starts)


def _check(rows: RowSource, batch_size: int, mesh: Mesh) -> None:
    pieces = meshes.row_count(mesh)
    if batch_size < 1 or batch_size % pieces:
        raise ValueError(f"batch_size={batch_size} must be a multiple of {pieces}, the pieces that the mesh splits a batch into.")
    if not len(rows):
        raise ValueError("The data set has no rows.")


def _epochs(count: int, text: int = 0, *, seed: int) -> Order:
    """place in the stream of epochs -> row, for each text of a mixture. grain computes each value of a permutation alone: nothing is
    stored."""
    import grain

    # grain counts its seed up at each epoch: with the seeds as they are, epoch 1 of seed 0 would be epoch 0 of seed 1.
    mixed = int(np.random.SeedSequence(seed).generate_state(text + 1)[text])
    stream = grain.MapDataset.range(count).shuffle(seed=mixed).repeat()
    return lambda place: int(stream[place])  # pyright: ignore[reportArgumentType]


def abstract(rows: RowSource, count: int, mesh: Mesh, members: tuple[int, ...] = ()) -> Batch:
    """Shapes, dtypes and shardings of a batch of so many rows, or of the batches of so many members, stacked."""
    sharding = meshes.member_rows(members[0], mesh) if members else meshes.rows(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*members, count, *x.shape), x.dtype, sharding=sharding), rows.abstract)


def place(rows: RowSource, indices: Sequence[int] | np.ndarray, mesh: Mesh) -> Batch:
    """The global batch of these rows, or for indices [K, B] the batches [K, B, ...] of K members.

    An index past the last row stands for padding. Only the rows of this process's devices are built.
    """
    indices = np.asarray(indices)
    *members, count = indices.shape
    leaves, structure = jax.tree.flatten(abstract(rows, count, mesh, tuple(members)))
    blank = [np.zeros(leaf.shape[indices.ndim :], leaf.dtype) for leaf in leaves]

    @functools.cache  # devices that hold the same rows, and the arrays, share one piece
    def piece(*bounds: tuple[int, int]) -> list[np.ndarray]:
        some = indices[tuple(itertools.starmap(slice, bounds))]
        chosen = [jax.tree.leaves(rows[int(i)]) if i < len(rows) else blank for i in some.ravel()]
        return [np.stack(arrays).reshape(*some.shape, *arrays[0].shape) for arrays in zip(*chosen, strict=True)]

    def held(number: int, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index
        return piece(*(part.indices(size)[:2] for part, size in zip(index, indices.shape, strict=False)))[number]

    arrays = [jax.make_array_from_callback(x.shape, x.sharding, functools.partial(held, i)) for i, x in enumerate(leaves)]
    return structure.unflatten(arrays)


def prefetch(make: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """make(item) for each item, in order, AHEAD of them computed early in one thread. What the thread raises is raised at that item's turn.

    Closing the iterator, or losing the last reference to it, ends the thread.
    """
    todo = iter(items)
    thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    try:
        ready = collections.deque(thread.submit(make, item) for item in itertools.islice(todo, AHEAD))
        while ready:
            result = ready.popleft().result()
            ready.extend(thread.submit(make, item) for item in itertools.islice(todo, 1))
            yield result
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
