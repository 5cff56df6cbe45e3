"""A data set as rows of tokens: text is read, tokenised and packed once, and every row is addressed by its index.

Shapes: T tokens per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from tuning.core.types import Batch
from tuning.data import packing, sources
from tuning.data.formats import Cut, Format
from tuning.data.pieces import Example, Tokenizer, encode

OVERLONG = ("truncate", "split", "drop", "error")
UNLEARNED = ("error", "drop")
CHUNK = 1000  # rows that are tokenised in one call


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a data set, in counts.

    examples   rows of text that were read
    rows       rows of tokens made of them
    tokens     in all rows, without padding
    learned    tokens that are learned, as targets
    truncated  examples that were cut to the row's length and kept
    split      examples that were cut into several
    cut_away   examples left out because truncation took all that is learned; they count in dropped too
    dropped    examples that are in no row
    length     tokens per row, padding included
    """

    examples: int
    rows: int
    tokens: int
    learned: int
    truncated: int
    split: int
    cut_away: int
    dropped: int
    length: int

    @property
    def learned_share(self) -> float:
        return self.learned / self.tokens

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / (self.rows * self.length)

    def __str__(self) -> str:
        notes = {
            "truncated": self.truncated,
            "split": self.split,
            "left out": self.dropped,
            "of these with the answer cut away whole": self.cut_away,
        }
        return (
            f"{self.examples:,} examples in {self.rows:,} rows of {self.length:,}: {self.tokens:,} tokens, {self.learned:,} learned "
            f"({self.learned_share:.1%}), padding {self.padding_share:.1%}" + "".join(f", {n:,} {word}" for word, n in notes.items() if n)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens: rows[i] is a Batch of numpy arrays [T].

    tokens   int32, all examples one after the other
    learned  bool, likewise: whether the token is to be learned
    offsets  example e is tokens[offsets[e]:offsets[e+1]]
    order, starts  row i holds the examples order[starts[i]:starts[i+1]]
    length   T
    pad      what stands where no token is; weights and segments, not this, tell padding apart
    report   what was counted on the way
    digest   of the files that were read
    """

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    length: int
    pad: int
    report: Report
    digest: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        tokens, targets = (np.full(self.length, self.pad, np.int32) for _ in range(2))
        weights = np.zeros(self.length, np.float32)
        segments, positions = (np.zeros(self.length, np.int32) for _ in range(2))
        at = 0
        for segment, example in enumerate(self.order[self.starts[index] : self.starts[index + 1]], 1):
            first, end = int(self.offsets[example]), int(self.offsets[example + 1])
            here = slice(at, at + end - first)
            told = slice(at, at + end - first - 1)  # the last token of an example is followed by nothing
            tokens[here] = self.tokens[first:end]
            targets[told] = self.tokens[first + 1 : end]
            weights[told] = self.learned[first + 1 : end]
            segments[here] = segment
            positions[here] = np.arange(end - first)
            at += end - first
        return Batch(tokens, targets, weights, segments, positions)


def dataset(
    tokenizer: Tokenizer,
    format: Format,
    *,
    path: str,
    subset: str | None = None,
    split: str = "train",
    columns: tuple[str, ...] = (),
    sample_by: str = "line",
    length: int = 1024,
    pack: bool = True,
    overlong: str = "truncate",
    unlearned: str = "error",
) -> Rows:
    """Reads, tokenises and packs a data set.

    path, subset, split, columns, sample_by  what to read; see `sources.read`
    length     tokens per row
    pack       whether several examples share a row; attention and targets stay inside each
    overlong   for an example of more than `length` tokens: "truncate", "split" (into examples that overlap by one token, so that each token
               is learned once; for formats that learn every token), "drop" or "error"
    unlearned  for an example in which nothing is learned: "error" or "drop"

    What was truncated or dropped is counted in `.report`. ValueError, with the row's number counted from 0, for anything wrong with a row,
    and if nothing is learned at all.
    """
    for key, value, known in (("overlong", overlong, OVERLONG), ("unlearned", unlearned, UNLEARNED)):
        if value not in known:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(known)}.")
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a token, and the one that follows it.")
    cut = format(tokenizer)
    data = sources.read(path, subset=subset, split=split, columns=tuple(columns), sample_by=sample_by)
    kept: list[Example] = []
    counts = dict(truncated=0, split=0, cut_away=0, dropped=0)
    for row, example in enumerate(_examples(data, cut, tokenizer, path)):
        try:
            kept += _fit(example, length, overlong, unlearned, counts)
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
    if not kept:
        raise ValueError(f"{path}: nothing is learned; all {len(data):,} examples were left out. Check the format and length={length}.")
    sizes = [len(example.tokens) for example in kept]
    order, starts = packing.pack(sizes, length) if pack else packing.apart(len(kept))
    learned = sum(int(example.learned[1:].sum()) for example in kept)
    report = Report(examples=len(data), rows=len(starts) - 1, tokens=sum(sizes), learned=learned, length=length, **counts)
    return Rows(
        tokens=np.concatenate([example.tokens for example in kept]),
        learned=np.concatenate([example.learned for example in kept]),
        offsets=np.cumsum([0, *sizes], dtype=np.int64),
        order=order,
        starts=starts,
        length=length,
        pad=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        report=report,
        digest=sources.digest(path, data, split=split),
    )


def _examples(data, cut: Cut, tokenizer: Tokenizer, path: str) -> Iterator[Example]:
    """One example per row of text, in order."""
    for first in range(0, len(data), CHUNK):
        table = data[first : first + CHUNK]
        cuts = []
        for row, values in enumerate(zip(*table.values(), strict=True), first):
            try:
                cuts.append(cut(dict(zip(table, values, strict=True))))
            except ValueError as error:
                raise ValueError(f"{path}, row {row}: {error}") from error
        yield from encode(cuts, tokenizer)


def _fit(example: Example, length: int, overlong: str, unlearned: str, counts: dict[str, int]) -> list[Example]:
    """The example as one or several of at most `length` tokens, or as none; `counts` says what happened."""
    tokens, learned = example
    size = len(tokens)
    if not learned[1:].any():
        if unlearned == "error":
            raise ValueError(
                f"None of its {size} tokens is learned. Mend the row, or set unlearned='drop' to leave such rows out, counted."
            )
        counts["dropped"] += 1
        return []
    if size <= length:
        return [example]
    if overlong == "error":
        raise ValueError(f"It has {size} tokens, and overlong='error' allows length={length}.")
    if overlong == "drop":
        counts["dropped"] += 1
        return []
    if overlong == "split":
        if not learned[1:].all():
            raise ValueError(
                f"Its {size} tokens would lose their prompt if split at length={length}. Set overlong to truncate, drop or error."
            )
        counts["split"] += 1
        return [Example(tokens[i : i + length], learned[i : i + length]) for i in range(0, size - 1, length - 1)]
    if learned[1:length].any():
        counts["truncated"] += 1
        return [Example(tokens[:length], learned[:length])]
    if unlearned == "error":
        first = int(np.argmax(learned[1:])) + 1
        raise ValueError(
            f"What is learned begins at token {first} of {size}, so truncation to length={length} cuts the answer away whole. "
            "Raise length, or set unlearned='drop' to leave such rows out, counted."
        )
    counts["cut_away"] += 1
    counts["dropped"] += 1
    return []


def preview(rows: Rows, tokenizer: Tokenizer, index: int = 0) -> str:
    """One row as text, example by example, what is learned between « and »."""
    row = rows[index]
    used = int((row.segments > 0).sum())
    lines = [f"row {index}: {used} tokens, {int(row.weights.sum())} of them learned «so», {rows.length - used} padding"]
    for segment in range(1, int(row.segments.max()) + 1):
        inside = np.flatnonzero(row.segments == segment)
        learned = np.concatenate([[False], row.weights[inside[:-1]] > 0])
        turns = np.flatnonzero(np.diff(learned)) + 1
        text = ""
        for run in np.split(np.arange(len(inside)), turns):
            words = tokenizer.decode(row.tokens[inside[run]].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text += f"«{words}»" if learned[run[0]] else str(words)
        lines += [f"--- example {segment}", text]
    return "\n".join(lines)
