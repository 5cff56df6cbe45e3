"""Packing: which examples share a row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

BLOCK = 8192  # examples


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best fit, decreasing: the longest example first, each into the fullest row that still takes it (Johnson, 1973).

    Returns (order, starts): row r holds the examples order[starts[r]:starts[r+1]]. Inside a row, and by their first example across rows,
    examples keep their order. The result depends on the lengths alone. ValueError for a length that is not in 1..capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"Lengths {lengths.min()}..{lengths.max()} do not fit rows of {capacity} tokens.")
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of by_room, sorted
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(example)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return _flat(rows)


def pack_sides(sizes: np.ndarray, capacities: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same for examples of several sizes [n, k] that must all fit a row: the encoder's and the decoder's tokens.

    The fullest row is that with the least room, summed over the k as shares of their capacities. To stay quick with many examples, BLOCK
    of them after one another are packed at a time, and share no row with others.
    """
    most = np.asarray(capacities, np.int64)
    if len(sizes) and not (sizes.min() >= 1 and (sizes <= most).all()):
        raise ValueError(f"Lengths {sizes.min(0)}..{sizes.max(0)} do not fit rows of {most} tokens.")
    rows: list[list[int]] = []
    for first in range(0, len(sizes), BLOCK):
        block, begun = sizes[first : first + BLOCK], len(rows)
        room, total = np.tile(most[:, None], len(block)), np.full(len(block), float(len(most)))
        for example in np.argsort(-(block / most).max(1), kind="stable"):
            size, tried = block[example], slice(len(rows) - begun + 1)  # one more than there are: an empty row always fits
            fits = (room[:, tried] >= size[:, None]).all(0)
            row = int(np.argmin(np.where(fits, total[tried], np.inf)))
            if row == len(rows) - begun:
                rows.append([])
            rows[begun + row].append(first + int(example))
            room[:, row] -= size
            total[row] = (room[:, row] / most).sum()
    return _flat(rows)


def apart(count: int) -> tuple[np.ndarray, np.ndarray]:
    """One example per row, as `pack` returns it."""
    return np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64)


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts) of rows of examples."""
    rows = sorted(sorted(row) for row in rows)
    return np.array([example for row in rows for example in row], np.int64), np.cumsum([0, *map(len, rows)], dtype=np.int64)
