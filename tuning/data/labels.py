"""Formats for models that classify: a label for a text or for two, and a tag for each word of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuning.data import columns, frame
from tuning.data.frame import Frame, Framed
from tuning.data.reader import Cut, Example, Format, Reader, Row

UNTAGGED = (-100, "-100")  # what cross-entropy in PyTorch ignores, so data sets mark with it what has no class
PLACES = ("first", "last")


def labels(*, text: str = "text", pair: str = "", label: str = "label") -> Format:
    """A text and its class, in the frame that the tokenizer puts around a text.

    text, pair  a column, or a template with columns in braces; `pair` is a second text for an encoder, as in [CLS] text [SEP] pair [SEP]
    label       the column with the class: its name, or its number from 0
    The class is the target at the token that the model's head reads, the first or the last; a text that is too long is cut inside its
    frame, the longer of two first.
    """
    one, other = columns.template(text), columns.template(pair) if pair else None

    def bind(reader: Reader) -> Cut:
        _check(reader, "labels", per_token=False)
        if other and reader.kind == "decoder":
            raise ValueError(
                f"format.pair={pair!r}: a decoder reads one text. Join the two in one template: format.text='{{first}} {{second}}'."
            )
        around = frame.frame(reader.tokenizer, pair=other is not None)
        at = 0 if reader.pool == "first" else -1

        def example(tokens: np.ndarray, types: np.ndarray | None, number: int) -> Example:
            if not len(tokens):
                raise ValueError("The text is empty, and the tokenizer puts no token of its own around it.")
            targets, learned = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
            targets[at], learned[at] = number, True
            return Example(tokens, targets, learned, types, shorten=shorten)

        def shorten(long: Example, length: int, _: int) -> Example:
            kept = around.trim(long.tokens, length)
            return example(long.tokens[kept], None if long.types is None else long.types[kept], int(long.targets[at]))

        def cut(rows: Sequence[Row]) -> list[Example]:
            numbers = [_number(columns.value(row, label), label, reader.classes) for row in rows]
            framed = around.encode([one(row) for row in rows], [other(row) for row in rows] if other else None)
            typed = around.typed and reader.kind == "encoder"
            return [example(f.tokens, f.types if typed else None, number) for f, number in zip(framed, numbers, strict=True)]

        return cut

    return bind


def tags(*, tokens: str = "tokens", tags: str = "tags", at: str = "first") -> Format:
    """Words and the class of each, in the frame that the tokenizer puts around a text.

    tokens  the column with the words: a list, or a text that is split at spaces. They are tokenised as a text, with one space between them
    tags    the column with their classes, names or numbers, as many as there are words; -100 for a word without one
    at      the token of a word at which its class is the target, "first" or "last"; a decoder has read the whole word at the last only
    """
    if at not in PLACES:
        raise ValueError(f"format.at={at!r} is not one of {', '.join(PLACES)}.")

    def bind(reader: Reader) -> Cut:
        _check(reader, "tags", per_token=True)
        around = frame.frame(reader.tokenizer)

        def shorten(long: Example, length: int, _: int) -> Example:
            kept = around.trim(long.tokens, length)
            return Example(long.tokens[kept], long.targets[kept], long.learned[kept])

        def example(framed: Framed, words: list[str], numbers: list[int | None]) -> Example:
            targets, learned = np.zeros(len(framed.tokens), np.int32), np.zeros(len(framed.tokens), bool)
            for word, number, place in zip(words, numbers, _places(framed, around, words, at), strict=True):
                if number is None:
                    continue
                if place < 0:
                    raise ValueError(f"The tokenizer makes no token of the word {word!r}. Remove it, or set its tag to -100.")
                targets[place], learned[place] = number, True
            return Example(framed.tokens, targets, learned, shorten=shorten)

        def cut(rows: Sequence[Row]) -> list[Example]:
            words, numbers = [], []
            for row in rows:
                words.append(_words(row, tokens))
                found = _list(row, tags)
                if len(found) != len(words[-1]):
                    raise ValueError(f"Column {tokens!r} has {len(words[-1])} words, and column {tags!r} {len(found)} tags.")
                numbers.append([None if tag in UNTAGGED else _number(tag, tags, reader.classes) for tag in found])
            framed = around.encode([" ".join(some) for some in words])
            return [example(*row) for row in zip(framed, words, numbers, strict=True)]

        return cut

    return bind


def _check(reader: Reader, name: str, per_token: bool) -> None:
    """ValueError unless the model classifies what the format labels."""
    if reader.kind == "encoder_decoder":
        raise ValueError(f"Format {name!r} is for encoders and decoders. An encoder-decoder says the class's name: set format.name=pairs.")
    if not reader.classes:
        head = "token_classification" if per_token else "sequence_classification"
        raise ValueError(
            f"Format {name!r} needs a model that classifies, and this one has no classes. Set model.head={head}, and model.classes."
        )
    if reader.per_token != per_token:
        what, other = ("every token", "tags") if reader.per_token else ("the whole text", "labels")
        raise ValueError(f"The model classifies {what}, which is not what format {name!r} labels. Set format.name={other}.")


def _number(value: Any, column: str, classes: tuple[str, ...]) -> int:
    """The number of the class that a cell names."""
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(classes):
        return number
    known = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    raise ValueError(
        f"Column {column!r} has {value!r}, which is no class of the model ({known}), nor a number from 0 to {len(classes) - 1}."
    )


def _list(row: Row, column: str) -> list[Any]:
    value = columns.value(row, column)
    if not isinstance(value, list | str):
        raise ValueError(f"Column {column!r} is {repr(value)[:60]}; a list, or a text that is split at spaces, is needed there.")
    return value.split() if isinstance(value, str) else value


def _words(row: Row, column: str) -> list[str]:
    words = _list(row, column)
    if not words:
        raise ValueError(f"Column {column!r} has no words.")
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"Column {column!r}, word {number} is {word!r}; words are text, and not empty.")
    return words


def _places(framed: Framed, around: Frame, words: list[str], at: str) -> np.ndarray:
    """Where each word's first or last token stands; -1 for a word without one."""
    inside = around.inside(framed.tokens)
    begin, end = framed.spans[inside].T
    sizes = np.array([len(word) for word in words])
    ends = np.cumsum(sizes + 1) - 1
    # A space before a word, which most tokenizers write into its first token or as a token of its own, is that word's.
    first = np.searchsorted(ends, begin, side="right")
    last = np.searchsorted(ends - sizes, np.maximum(end, begin + 1) - 1, side="right") - 1
    for joined in np.flatnonzero(last > first):
        raise ValueError(f"The tokenizer joins the words {words[first[joined]]!r} and {words[last[joined]]!r} in one token.")
    owned = first < len(words)
    places = np.full(len(words), -1)
    turn = slice(None, None, -1 if at == "first" else 1)  # of several tokens of a word, the one that is written last stays
    places[first[owned][turn]] = inside[owned][turn]
    return places
