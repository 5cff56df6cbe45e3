"""Who reads, and what: the model as far as its examples depend on it, the examples, and what makes them of rows.

Shapes: n tokens of an example, m of what its encoder reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Tokenizer = Any  # a transformers PreTrainedTokenizerBase, handed in: importing transformers takes most of a second
KINDS = ("decoder", "encoder", "encoder_decoder")
POOLS = ("first", "last")


@dataclasses.dataclass(frozen=True)
class Reader:
    """The model that reads the examples.

    tokenizer  a fast tokenizer of transformers
    kind       "decoder", "encoder" or "encoder_decoder"
    classes    the names of the classes that its head tells apart, in order; empty for a language model
    per_token  whether the head classifies every token, and not the sequence
    pool       the token whose hidden state classifies the sequence, "first" or "last"
    start      the id that an encoder-decoder's decoder starts from
    slots      positions that are kept free before each example, or before what the encoder of an encoder-decoder reads
    """

    tokenizer: Tokenizer
    kind: str = "decoder"
    classes: tuple[str, ...] = ()
    pool: str = "last"
    start: int | None = None
    per_token: bool = False
    slots: int = 0

    def __post_init__(self):
        for key, known in (("kind", KINDS), ("pool", POOLS)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of {', '.join(known)}.")
        if self.kind == "encoder_decoder" and self.start is None:
            raise ValueError("An encoder-decoder needs a start token: decoder_start_token_id in the checkpoint's config.json.")


class Example(NamedTuple):
    """What stands, and is to be said, at each position.

    tokens   int32 [n]
    targets  int32 [n], what is to be said there: the token that follows, or a class
    learned  bool [n], whether the target counts
    types    int32 [n], which of two texts a token belongs to, or None
    inputs   int32 [m], what the encoder of an encoder-decoder reads, or None
    shorten  (example, length, input_length) -> the example cut to that many tokens. None where each token is told from those before it:
             such an example may end anywhere, and begin anywhere too
    """

    tokens: np.ndarray
    targets: np.ndarray
    learned: np.ndarray
    types: np.ndarray | None = None
    inputs: np.ndarray | None = None
    shorten: Callable[[Example, int, int], Example] | None = None


Row = Mapping[str, Any]  # column -> what stands there
Cut = Callable[[Sequence[Row]], list[Example]]  # one example per row, each the same as if it were alone; ValueError for a row that is wrong
Format = Callable[[Reader], Cut]  # ValueError if the format is not for such a model, or the tokenizer lacks what it needs
