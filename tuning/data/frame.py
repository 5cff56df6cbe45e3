"""Whole texts in the frame that a tokenizer puts around them: [CLS] a [SEP] b [SEP], or a </s>.

Shapes: n tokens of a framed text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tuning.data.pieces import special_tokens
from tuning.data.reader import Tokenizer


class Framed(NamedTuple):
    """A text, or two, in the frame.

    tokens  int32 [n]
    types   int32 [n], which of two texts a token belongs to, as the tokenizer has it
    spans   int64 [n, 2], where in its text a token begins and ends, in characters; 0, 0 for the frame's own
    """

    tokens: np.ndarray
    types: np.ndarray
    spans: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A tokenizer with what it puts around a text, or around two.

    own      the ids of the frame's tokens
    control  these and all other control tokens, which no text becomes
    typed    whether the tokenizer gives any token another type than 0
    """

    tokenizer: Tokenizer
    own: np.ndarray
    control: np.ndarray
    typed: bool

    def encode(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> list[Framed]:
        """Each text, or each text and its second. ValueError if a text becomes a control token.

        A control token that a text spells becomes the letters of that word.
        """
        found = _tokenise(self.tokenizer, list(texts), None if seconds is None else list(seconds))
        columns = (found["input_ids"], found["token_type_ids"], found["offset_mapping"], found["special_tokens_mask"])
        made = []
        for number, (ids, types, spans, framing) in enumerate(zip(*columns, strict=True)):
            tokens = np.array(ids, np.int32)
            if np.isin(tokens[np.array(framing) == 0], self.control).any():
                raise ValueError(f"The tokenizer makes a control token of plain text: {texts[number][:60]!r}.")
            made.append(Framed(tokens, np.array(types, np.int32), np.array(spans, np.int64).reshape(-1, 2)))
        return made

    def inside(self, tokens: np.ndarray) -> np.ndarray:
        """Where in framed tokens the text stands, in order."""
        return np.flatnonzero(~np.isin(tokens, self.own))

    def trim(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Which of the tokens stay when they are cut to `length`: the frame, and the beginnings of the texts, the longer being cut first.

        ValueError if there is room for the frame only.
        """
        if len(tokens) <= length:
            return np.arange(len(tokens))
        inside = self.inside(tokens)
        room = length - (len(tokens) - len(inside))
        if room < 1:
            raise ValueError(f"The {length - room} tokens that the tokenizer puts around a text leave no room for it in {length}.")
        texts = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
        keep = [room]
        if len(texts) == 2:
            short = min(len(texts[0]), len(texts[1]), room // 2)
            keep = [short, room - short] if len(texts[0]) <= len(texts[1]) else [room - short, short]
        cut = np.concatenate([text[count:] for text, count in zip(texts, keep, strict=True)])
        return np.delete(np.arange(len(tokens)), cut)


def frame(tokenizer: Tokenizer, pair: bool = False) -> Frame:
    """The frame of a text, or of two. ValueError if nothing would stand between the two."""
    found = _tokenise(tokenizer, ["a"], ["a"] if pair else None)
    ids, framing = np.array(found["input_ids"][0], np.int32), np.array(found["special_tokens_mask"][0], bool)
    if pair and (np.diff(np.flatnonzero(~framing)) == 1).all():
        raise ValueError("The tokenizer puts nothing between two texts. Join them in one template: format.text='{first} {second}'.")
    own = np.unique(ids[framing])
    control = np.union1d(own, np.array(list(special_tokens(tokenizer)), np.int32))
    return Frame(tokenizer, own, control, any(found["token_type_ids"][0]))


def _tokenise(tokenizer: Tokenizer, texts: list[str], seconds: list[str] | None):
    return tokenizer(
        texts, seconds, split_special_tokens=True, return_token_type_ids=True, return_special_tokens_mask=True, return_offsets_mapping=True,
        return_attention_mask=False, verbose=False,
    )  # fmt: skip
