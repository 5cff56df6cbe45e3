"""A mixture: training rows, and among them rows of other text, so that what the model knew is rehearsed.

Rows of the other text come at even distances, and each text is gone through in epochs of its own: which row stands at a place of the
stream is a matter of counting, and nothing has to be remembered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

from tuning.core.types import Batch
from tuning.data.dataset import Rows, dataset
from tuning.data.reader import Format, Reader

Order = Callable[[int], int]  # place in a stream -> row


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The rows of two texts by one index: those of the other follow all of the first one's.

    share  of the stream that the rows of the other text make up
    """

    first: Rows
    other: Rows
    share: float

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"data.replay.share={self.share} of the training rows must lie between 0 and 1.")
        first, other = (vars(rows.abstract) for rows in (self.first, self.other))
        if unlike := [name for name in first if first[name] != other[name]]:
            raise ValueError(f"Rows of data.replay and of data.train differ in {', '.join(unlike)}. Give both the same kind of format.")

    def __len__(self) -> int:
        return len(self.first) + len(self.other)

    def __getitem__(self, index: int) -> Batch:
        return self.first[index] if index < len(self.first) else self.other[index - len(self.first)]

    @property
    def abstract(self) -> Batch:
        """Shape and dtype of a row."""
        return self.first.abstract

    def order(self, first: Order, other: Order) -> Order:
        """The order of the mixture from those of the two. Of any n places in a row n * share, less or more than one, are the other's."""
        share = Fraction(str(self.share))  # exact, however long the stream

        def at(place: int) -> int:
            before, now = (n * share.numerator // share.denominator for n in (place, place + 1))
            return first(place - before) if before == now else len(self.first) + other(before)

        return at


def replay(
    reader: Reader,
    format: Format,
    first: Rows,
    *,
    path: str,
    share: float,
    subset: str | None = None,
    split: str = "train",
    columns: tuple[str, ...] = (),
    sample_by: str = "line",
    pack: bool = True,
    overlong: str = "truncate",
    unlearned: str = "error",
) -> Mixture:
    """The training rows `first`, mixed with rows of the same length out of another data set; see `dataset` for the keys not named here.

    share  of the rows that are trained on; the others are those of `first`. ValueError if it does not lie between 0 and 1
    """
    other = dataset(
        reader, format, path=path, subset=subset, split=split, columns=columns, sample_by=sample_by, length=first.length,
        input_length=first.input_length, pack=pack, overlong=overlong, unlearned=unlearned,
    )  # fmt: skip
    return Mixture(first, other, share)
