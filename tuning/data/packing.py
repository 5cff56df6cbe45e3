"""Packing: which examples share a row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


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
    rows = sorted(sorted(row) for row in rows)
    return np.array([example for row in rows for example in row], np.int64), np.cumsum([0, *map(len, rows)], dtype=np.int64)


def apart(count: int) -> tuple[np.ndarray, np.ndarray]:
    """One example per row, as `pack` returns it."""
    return np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64)
