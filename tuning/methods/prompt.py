"""Prompt tuning: vectors that stand before the tokens of each example (Lester et al., 2021, arXiv:2104.08691).

In an encoder-decoder they stand before what the encoder reads.
Shapes: B sequences, T tokens, n prompt positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import Method
from tuning.nn.sites import Outline, Site, Sites

STARTS = ("vocabulary", "random", "text")
LEAF = "embed/adapter/prompt"


class Prompt(nnx.Module):
    """The first n positions of each example get the prompt's vectors, the others their token's."""

    def __init__(self, site: Site, length: int, rngs: nnx.Rngs):
        self.prompt = nnx.Param(jax.random.normal(rngs.params(), (length, site.shape[1])), out_sharding=(None, "embed"))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return put(self.prompt[...], tokens_BT, positions_BT, lookup)

    def output(self, x_MD: jax.Array, project: Callable[[jax.Array], jax.Array], key: jax.Array | None) -> jax.Array:
        return project(x_MD)


def put(prompt_nD: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array | None, lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Embedded tokens [B, T, D], with the prompt at the positions before n."""
    x_BTD = lookup(tokens_BT)
    if positions_BT is None:
        return x_BTD
    rows_BTD = jnp.take(prompt_nD.astype(x_BTD.dtype), positions_BT.clip(0, prompt_nD.shape[0] - 1), axis=0)
    return jnp.where((positions_BT < prompt_nD.shape[0])[..., None], rows_BTD, x_BTD)


def prompt(outline: Outline, *, length: int = 20, init: str = "vocabulary", text: str = "", seed: int = 0) -> Method:
    """A prompt of `length` vectors, which learns; nothing else does. Beyond 20, the paper's gains are small.

    init  "vocabulary" (the rows of random tokens, drawn with `seed`), "text" (those of the tokens of `text`, repeated or cut to the length)
          or "random" (a normal distribution with the spread of the embedding). The paper finds all alike in large models, and the first two
          better in small ones. Rates are high: the paper takes 0.3 with Adafactor.
    """
    check(outline, length)
    if init not in STARTS:
        raise ValueError(f"method.init={init!r} is not one of {', '.join(STARTS)}.")
    if bool(text) != (init == "text"):
        raise ValueError(f"method.text={text!r} goes with init='text', and init={init!r}. Set both or neither.")

    site = outline.embeds[0]
    ids = tokens(outline, length, text, site.shape[0], seed)

    def start(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        table_VD = leaves["embed/table"]
        if init == "random":
            rows_nD = leaves[LEAF] * table_VD.astype(jnp.float32).std() * site.scale
        else:
            rows_nD = table_VD[jnp.asarray(ids)] * site.scale
        return tree.unflatten({**leaves, LEAF: jax.device_put(rows_nD.astype(leaves[LEAF].dtype), leaves[LEAF].sharding)})

    embed = lambda site, rngs: Prompt(site, length, rngs)  # noqa: E731
    loose = ("init", "text", "seed")
    return Method(tuned=lambda name: name == LEAF, sites=Sites(embed=embed), start=start, fold=None, slots=length, loose=loose)


def check(outline: Outline, length: int) -> None:
    """ValueError where there is no place for a prompt."""
    if length < 1:
        raise ValueError(f"method.length={length}: a prompt has at least one position.")
    if not outline.embeds:
        raise ValueError("This network offers no place for a prompt.")


def tokens(outline: Outline, length: int, text: str, rows: int, seed: int) -> np.ndarray:
    """The ids whose rows a prompt starts from."""
    if not text:
        return np.random.default_rng(seed).integers(0, rows, length)
    if outline.encode is None:
        raise ValueError("method.init='text' needs a tokenizer, and this model has none.")
    found = outline.encode(text)
    if not found:
        raise ValueError(f"method.text={text!r} has no tokens.")
    return np.resize(np.array(found), length)
