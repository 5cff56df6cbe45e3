"""Pieces: the stretches of text that an example is made of, and how they become tokens.

The end of a piece is always the end of a token. That is how a model meets the text when it generates: the prompt was tokenised alone, and
the answer follows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tuning.data.reader import Example, Tokenizer

SPACES = ("▁", "Ġ")  # how SentencePiece and byte-level tokenizers write a space
BREAK = "\n"  # no tokenizer that does so joins it with what follows; if one did, it would be an error


class Piece(NamedTuple):
    """A stretch of an example.

    text     to be tokenised; or instead
    ids      tokens that are there already
    learned  whether its tokens are learned, as targets
    control  whether control tokens spelt in the text are meant (a chat template's are)
    stops    learned only as far as the last control token: what a template writes after the end of a turn is not the model's to say
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    learned: bool = False
    control: bool = False
    stops: bool = False


def encode(cuts: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Example]:
    """The examples of many rows, one call of the tokenizer for all pieces of a kind. Each token's target is the token after it."""
    names = special_tokens(tokenizer)
    special = frozenset(names)
    prefixed = "".join(tokenizer.tokenize("a")).startswith(SPACES)  # SentencePiece puts a space before a text: right only at its start
    jobs: dict[tuple[bool, str], list[tuple[int, int]]] = {}
    ids: list[list[Sequence[int]]] = [[piece.ids for piece in pieces] for pieces in cuts]
    for i, pieces in enumerate(cuts):
        before = ""
        for j, piece in enumerate(pieces):
            if piece.text:
                jobs.setdefault((piece.control, before if piece.control else before and BREAK), []).append((i, j))
                before = _ending(piece, names) if prefixed else ""
    for (control, before), places in jobs.items():
        found = _tokenise([cuts[i][j].text for i, j in places], tokenizer, control, before)
        for (i, j), tokens in zip(places, found, strict=True):
            if not control and not special.isdisjoint(tokens):
                raise ValueError(f"The tokenizer makes a control token of plain text: {cuts[i][j].text[:60]!r}.")
            ids[i][j] = tokens
    return [_example(pieces, tokens, special, pad_id(tokenizer)) for pieces, tokens in zip(cuts, ids, strict=True)]


def _ending(piece: Piece, names: Mapping[int, str]) -> str:
    """What to tokenise the next piece after, so that it gets the space that it would get there and no other."""
    return next((name for name in names.values() if piece.control and piece.text.endswith(name)), BREAK)


def _tokenise(texts: list[str], tokenizer: Tokenizer, control: bool, before: str) -> list[list[int]]:
    """The ids of each text where it stands after `before`."""
    settings: dict[str, Any] = dict(add_special_tokens=False, split_special_tokens=not control, return_attention_mask=False, verbose=False)
    if not before:
        return tokenizer(texts, **settings)["input_ids"]
    known = tokenizer(before, **settings)["input_ids"]
    found = tokenizer([before + text for text in texts], **settings)["input_ids"]
    for text, tokens in zip(texts, found, strict=True):
        if tokens[: len(known)] != known:
            raise ValueError(f"The tokenizer joins {before!r} with {text[:30]!r}, so the text cannot be tokenised as a continuation.")
    return [tokens[len(known) :] for tokens in found]


def _example(pieces: Sequence[Piece], ids: Sequence[Sequence[int]], special: frozenset[int], pad: int) -> Example:
    tokens = np.array([*itertools.chain.from_iterable(ids)], np.int32)
    learned = np.zeros(len(tokens), bool)
    at = 0
    for piece, part in zip(pieces, ids, strict=True):
        count = len(part)
        if piece.stops:
            while count and part[count - 1] not in special:
                count -= 1
        learned[at : at + count] = piece.learned
        at += len(part)
    targets, counts = np.full_like(tokens, pad), np.zeros_like(learned)  # the last token is followed by nothing
    targets[:-1], counts[:-1] = tokens[1:], learned[1:]
    return Example(tokens, targets, counts)


def start_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text by default."""
    bare, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return tuple(full[:i])
    return ()


def end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end token, and without one the model would not learn to stop. Set its eos_token in "
            "tokenizer_config.json to the token that ends a text."
        )
    return tokenizer.eos_token_id


def pad_id(tokenizer: Tokenizer) -> int:
    """What stands where no token is: the tokenizer's padding, or 0."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


# Control tokens.


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: text} of the control tokens; the token for unknown words is none."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i: text for i, text in {**named, **added}.items() if i != tokenizer.unk_token_id or i == tokenizer.eos_token_id}


def control_tokens(tokenizer: Tokenizer) -> re.Pattern:
    """Matches a control token's text."""
    special = {*special_tokens(tokenizer).values(), *tokenizer.all_special_tokens}
    return re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"(?!)")


MARK = "\ufdd0"  # a code point that Unicode sets apart for use inside programs: no text has it
MARKED = re.compile(f"{MARK}(\\d+){MARK}")


def hide(value: Any, control: re.Pattern, typed: list[str]) -> Any:
    """The value with every control token in its strings replaced by a mark; what was there is appended to `typed`."""

    def mark(match: re.Match) -> str:
        typed.append(match[0])
        return f"{MARK}{len(typed) - 1}{MARK}"

    if isinstance(value, str):
        if MARK in value:
            raise ValueError("The text has the code point U+FDD0, which is not a character. Remove it.")
        return control.sub(mark, value)
    if isinstance(value, Mapping):
        return {key: hide(item, control, typed) for key, item in value.items()}
    return [hide(item, control, typed) for item in value] if isinstance(value, list) else value


def reveal(text: str, typed: list[str], like: Piece) -> list[Piece]:
    """The text as pieces, with each mark replaced by the letters of the control token that was there."""
    if not typed:
        return [like._replace(text=text, stops=like.stops and like.learned)]
    parts = MARKED.split(text)  # text, number, text, number, ..., text
    pieces = [like._replace(text=typed[int(part)] if i % 2 else part, control=i % 2 == 0, stops=False) for i, part in enumerate(parts)]
    return [*pieces[:-1], pieces[-1]._replace(stops=like.stops and like.learned)]
