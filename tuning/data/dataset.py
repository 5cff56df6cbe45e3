"""A data set as rows of tokens: text is read, tokenised and packed once, and every row is addressed by its index.

Shapes: T tokens per row, S tokens of an encoder per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tuning.core.types import Batch, Inputs
from tuning.data import packing, sources
from tuning.data.pieces import pad_id
from tuning.data.reader import Cut, Example, Format, Reader, Tokenizer

OVERLONG = ("truncate", "split", "drop", "error")
UNLEARNED = ("error", "drop")
CHUNK = 1000  # rows that are tokenised in one call


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a data set, in counts.

    examples   rows of text that were read
    rows       rows of tokens made of them
    tokens     in all rows, without padding
    learned    targets that are learned
    truncated  examples that were cut to the row's length and kept
    split      examples that were cut into several
    cut_away   examples left out because truncation took all that is learned; they count in dropped too
    dropped    examples that are in no row
    length     tokens per row, padding included
    input_tokens, inputs_truncated, input_length  the same of what an encoder-decoder's encoder reads, where `tokens` are the decoder's
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
    input_tokens: int = 0
    inputs_truncated: int = 0
    input_length: int = 0

    @property
    def learned_share(self) -> float:
        return self.learned / self.tokens

    @property
    def padding_share(self) -> float:
        return 1 - (self.tokens + self.input_tokens) / (self.rows * (self.length + self.input_length))

    def __str__(self) -> str:
        notes = {
            "truncated": self.truncated,
            "with the encoder's text truncated": self.inputs_truncated,
            "split": self.split,
            "left out": self.dropped,
            "of these with the answer cut away whole": self.cut_away,
        }
        encoder = f" after {self.input_length:,} of the encoder: {self.input_tokens:,} and" if self.input_length else ":"
        return (
            f"{self.examples:,} examples in {self.rows:,} rows of {self.length:,}{encoder} {self.tokens:,} tokens, "
            f"{self.learned:,} learned ({self.learned_share:.1%}), padding {self.padding_share:.1%}"
            + "".join(f", {n:,} {word}" for word, n in notes.items() if n)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """Arrays of all examples one after the other: those of example e are values[offsets[e]:offsets[e+1]]."""

    values: dict[str, np.ndarray]
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, chosen: np.ndarray, length: int, blanks: dict[str, int]) -> dict[str, np.ndarray]:
        """The values of some examples in one row [length], then blanks; with the row's segments and positions."""
        firsts, sizes = self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen]
        positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        at = np.repeat(firsts, sizes) + positions
        found = {name: values[at] for name, values in self.values.items()}
        found.update(segments=np.repeat(np.arange(1, len(chosen) + 1), sizes), positions=positions)
        made = {}
        for name, values in found.items():
            made[name] = np.full(length, blanks.get(name, 0), np.float32 if name == "weights" else np.int32)
            made[name][: len(at)] = values
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens: rows[i] is a Batch of numpy arrays [T], or [S] in its inputs.

    decoder  tokens, targets, weights (bool) and, where the tokenizer tells them apart, types of all examples
    encoder  tokens of what an encoder-decoder's encoder reads, or None
    order, starts  row i holds the examples order[starts[i]:starts[i+1]]
    length, input_length  T and S
    pad      what stands where no token is; weights and segments, not this, tell padding apart
    classes  the names of the targets, if they are classes and not tokens
    report   what was counted on the way
    digest   of the files that were read
    """

    decoder: Flat
    encoder: Flat | None
    order: np.ndarray
    starts: np.ndarray
    length: int
    input_length: int
    pad: int
    classes: tuple[str, ...]
    report: Report
    digest: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        chosen = self.order[self.starts[index] : self.starts[index + 1]]
        blanks = {"tokens": self.pad, "targets": 0 if self.classes else self.pad}
        inputs = None if self.encoder is None else Inputs(**self.encoder.row(chosen, self.input_length, blanks))
        return Batch(**self.decoder.row(chosen, self.length, blanks), inputs=inputs)

    @property
    def abstract(self) -> Batch:
        """Shape and dtype of a row."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self[0])


def dataset(
    reader: Reader,
    format: Format,
    *,
    path: str,
    subset: str | None = None,
    split: str = "train",
    columns: tuple[str, ...] = (),
    sample_by: str = "line",
    length: int = 1024,
    input_length: int = 0,
    pack: bool = True,
    overlong: str = "truncate",
    unlearned: str = "error",
) -> Rows:
    """Reads, tokenises and packs a data set.

    path, subset, split, columns, sample_by  what to read; see `sources.read`
    length     tokens per row
    input_length  tokens per row of the encoder of an encoder-decoder; 0 for as many as `length`
    pack       whether several examples share a row; attention and targets stay inside each
    overlong   for an example of more than `length` tokens: "truncate" (inside what the tokenizer puts around a text, if that is there),
               "split" (into examples that overlap by one token, so that each token is learned once; for formats that learn every token),
               "drop" or "error"
    unlearned  for an example in which nothing is learned: "error" or "drop"

    What was truncated or dropped is counted in `.report`. ValueError, with the row's number counted from 0, for anything wrong with a row,
    and if nothing is learned at all.
    """
    _check_options(reader, length, input_length, overlong, unlearned)
    input_length = (input_length or length) if reader.kind == "encoder_decoder" else 0
    room = (length, input_length - reader.slots) if input_length else (length - reader.slots, 0)
    if min(room[0], room[1] or 2) < 2:
        raise ValueError(f"The method keeps {reader.slots} positions of each example, which leaves no room for text in length={length}.")
    cut = format(reader)
    data = sources.read(path, subset=subset, split=split, columns=tuple(columns), sample_by=sample_by)
    kept: list[Example] = []
    counts = dict(truncated=0, inputs_truncated=0, split=0, cut_away=0, dropped=0)
    for row, example in enumerate(_examples(data, cut, path)):
        try:
            kept += [_slotted(part, reader) for part in _fit(example, *room, overlong, unlearned, counts)]
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: {error}") from None
    if not kept:
        raise ValueError(f"{path}: nothing is learned; all {len(data):,} examples were left out. Check the format and length={length}.")
    decoder = _flat(kept, tokens="tokens", targets="targets", weights="learned", types="types")
    encoder = None if kept[0].inputs is None else _flat(kept, tokens="inputs")
    order, starts = _pack(decoder, encoder, length, input_length) if pack else packing.apart(len(kept))
    report = Report(
        examples=len(data), rows=len(starts) - 1, tokens=len(decoder.values["tokens"]), length=length,
        learned=int(decoder.values["weights"].sum()), input_tokens=len(encoder.values["tokens"]) if encoder else 0,
        input_length=input_length, **counts,
    )  # fmt: skip
    return Rows(
        decoder, encoder, order, starts, length, input_length,
        pad=pad_id(reader.tokenizer), classes=reader.classes, report=report, digest=sources.digest(path, data, split=split),
    )  # fmt: skip


def blank(length: int, input_length: int = 0, types: bool = False) -> Rows:
    """One row that is full, of no text: what a plan counts with where no data is read. `types`: whether tokens tell two texts apart."""

    def flat(size: int, *names: str) -> Flat:
        return Flat({name: np.ones(size, bool if name == "weights" else np.int32) for name in names}, np.array([0, size]))

    decoder = flat(length, "tokens", "targets", "weights", *(["types"] if types else []))
    encoder = flat(input_length, "tokens") if input_length else None
    report = Report(1, 1, length, length, 0, 0, 0, 0, length, input_length, 0, input_length)
    return Rows(decoder, encoder, *packing.apart(1), length, input_length, pad=0, classes=(), report=report, digest="")


def _check_options(reader: Reader, length: int, input_length: int, overlong: str, unlearned: str) -> None:
    for key, value, known in (("overlong", overlong, OVERLONG), ("unlearned", unlearned, UNLEARNED)):
        if value not in known:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(known)}.")
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a token, and the one that follows it.")
    if input_length and (reader.kind != "encoder_decoder" or input_length < 2):
        raise ValueError(f"input_length={input_length} is for the encoder of an encoder-decoder, and at least 2. Leave it at 0.")


def _flat(examples: list[Example], **fields: str) -> Flat:
    """{name in a row: field of the examples}, where the examples have it."""
    arrays = {name: [getattr(example, field) for example in examples] for name, field in fields.items()}
    offsets = np.cumsum([0, *map(len, arrays["tokens"])], dtype=np.int64)
    return Flat({name: np.concatenate(some) for name, some in arrays.items() if some[0] is not None}, offsets)


def _pack(decoder: Flat, encoder: Flat | None, length: int, input_length: int) -> tuple[np.ndarray, np.ndarray]:
    if encoder is None:
        return packing.pack(decoder.sizes, length)
    return packing.pack_sides(np.stack([decoder.sizes, encoder.sizes], axis=1), (length, input_length))


def _examples(data, cut: Cut, path: str) -> Iterator[Example]:
    """One example per row of text, in order."""
    for first in range(0, len(data), CHUNK):
        table = data[first : first + CHUNK]
        rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        try:
            examples = cut(rows)
        except ValueError:
            for number, row in enumerate(rows, first):  # which one was it?
                try:
                    cut([row])
                except ValueError as error:
                    raise ValueError(f"{path}, row {number}: {error}") from error
            raise
        yield from examples


def _fit(example: Example, length: int, input_length: int, overlong: str, unlearned: str, counts: dict[str, int]) -> list[Example]:
    """The example as one or several that fit a row, or as none; `counts` says what happened."""
    size, read = len(example.tokens), 0 if example.inputs is None else len(example.inputs)
    if not example.learned.any():
        if unlearned == "error":
            raise ValueError(
                f"None of its {size} tokens is learned. Mend the row, or set unlearned='drop' to leave such rows out, counted."
            )
        counts["dropped"] += 1
        return []
    if size <= length and read <= input_length:
        return [example]
    if overlong == "error":
        most = f"length={length}" if size > length else f"input_length={input_length}"
        raise ValueError(f"It has {size if size > length else read} tokens, and overlong='error' allows {most}.")
    if overlong == "drop":
        counts["dropped"] += 1
        return []
    if overlong == "split":
        if example.shorten or not example.learned[:-1].all():
            raise ValueError(
                f"Its {max(size, read)} tokens would lose their {'context' if example.shorten else 'prompt'} if split at length={length}. "
                "Set overlong to truncate, drop or error."
            )
        counts["split"] += 1
        return [_piece(example, i, length) for i in range(0, size - 1, length - 1)]
    short = example.shorten(example, length, input_length) if example.shorten else _piece(example, 0, length)
    if short.learned.any():
        counts["truncated"] += size > length
        counts["inputs_truncated"] += read > input_length
        return [short]
    if unlearned == "error":
        first = int(np.argmax(example.learned)) + 1
        raise ValueError(
            f"What is learned begins at token {first} of {size}, so truncation to length={length} cuts the answer away whole. "
            "Raise length, or set unlearned='drop' to leave such rows out, counted."
        )
    counts["cut_away"] += 1
    counts["dropped"] += 1
    return []


def _slotted(example: Example, reader: Reader) -> Example:
    """The example with free positions before it. What is said at a first token, for the whole, is said at the first of these."""
    if not reader.slots:
        return example
    free = lambda array: np.zeros(reader.slots, array.dtype)  # noqa: E731
    before = lambda array: None if array is None else np.concatenate([free(array), array])  # noqa: E731
    if example.inputs is not None:
        return example._replace(inputs=before(example.inputs))
    targets, learned = (
        np.concatenate([array, free(array)] if at_first(reader) else [free(array), array]) for array in (example.targets, example.learned)
    )
    return example._replace(tokens=before(example.tokens), targets=targets, learned=learned, types=before(example.types))


def at_first(reader: Reader) -> bool:
    """Whether something is said at the first position, for the whole example."""
    return bool(reader.classes) and reader.pool == "first" and not reader.per_token


def unslotted(batch: Batch, slots: int) -> Batch:
    """The batch with padding where positions are kept free, and positions that begin behind them."""
    side = batch if batch.inputs is None else batch.inputs
    kept = jnp.where(side.positions < slots, 0, side.segments)
    side = dataclasses.replace(side, segments=kept, positions=jnp.maximum(side.positions - slots, 0))
    return side if isinstance(side, Batch) else dataclasses.replace(batch, inputs=side)


def _piece(example: Example, first: int, length: int) -> Example:
    """That many tokens of a language model's example; the last one is followed by nothing."""
    tokens, targets, learned = (array[first : first + length].copy() for array in example[:3])
    targets[-1], learned[-1] = example.targets[-1], False
    return Example(tokens, targets, learned)


def preview(rows: Rows, tokenizer: Tokenizer, index: int = 0) -> str:
    """One row as text, example by example, what is learned between « and »: tokens, or after a token its class."""
    row = rows[index]
    used = int((row.segments > 0).sum())
    lines = [f"row {index}: {used} tokens, {int(row.weights.sum())} of them learned «so», {rows.length - used} padding"]
    if row.inputs is not None:
        read = int((row.inputs.segments > 0).sum())
        lines[0] += f"; in the encoder {read} tokens, {rows.input_length - read} padding"
    for segment in range(1, int(row.segments.max()) + 1):
        inside = row.segments == segment
        tokens, targets, learned = row.tokens[inside], row.targets[inside], row.weights[inside] > 0
        lines.append(f"--- example {segment}")
        if row.inputs is not None:
            read = row.inputs.tokens[row.inputs.segments == segment]
            lines += ["".join(_spans(read, [len(read)], tokenizer)), "--- and its answer"]
        if rows.classes:
            places = np.flatnonzero(learned)
            spans = _spans(tokens, [*(places + 1).tolist(), len(tokens)], tokenizer)
            marks = [f"«{rows.classes[target]}»" for target in targets[places]]
            lines.append("".join(part for pair in zip(spans, [*marks, ""], strict=True) for part in pair))
        else:
            said = np.append(tokens[0], targets if learned[-1] else targets[:-1])
            marked = np.append(False, learned)[: len(said)]
            turns = [*(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(said)]
            spans = _spans(said, turns, tokenizer)
            lines.append("".join(f"«{span}»" if marked[turn - 1] else span for span, turn in zip(spans, turns, strict=True)))
    return "\n".join(lines)


def _spans(tokens: np.ndarray, ends: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of the tokens, in spans that end where `ends` say."""
    words = [tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False) for end in ends]
    return [word[len(before) :] for before, word in zip(["", *words[:-1]], words, strict=True)]
