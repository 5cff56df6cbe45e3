"""Cached generation: one pass over the prompts, then one token at a time inside one compiled loop.

An encoder-decoder first reads its inputs; its decoder's prompt is the start token, and what else it is to begin with.
Shapes: B sequences, T prompt slots, S input slots, D width, V vocabulary, N new tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tuning.core import mesh
from tuning.core.types import Head, Inputs, Tree
from tuning.decode import sample
from tuning.nn.cache import Cache

# extend(params, tokens_BT, positions_BT, segments_BT, cache) -> (hidden_BTD, head, cache with the tokens)
Extend = Callable[[Tree, jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Head, Cache]]
EmptyCache = Callable[[int, int], Cache]  # empty_cache(batch, slots)
Remember = Callable[[Tree, Inputs, Cache], Cache]  # remember(params, inputs, cache) -> cache with what the encoder makes of them

BUCKET = 64  # slots are a multiple of it, so that prompts and inputs of all lengths share a few compiled programs


def generate(
    extend: Extend,
    empty_cache: EmptyCache,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    pad: int = 0,
    remember: Remember | None = None,
    inputs: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """What the model says after each prompt, as token ids: without the prompt, without padding, without the stop token.

    extend, empty_cache  of the network; pass the same two again, since what is compiled is remembered by them
    max_new_tokens       where a sequence ends that meets no stop token
    max_length           tokens that the model can read, prompt and answer together, and in its encoder; None for no limit
    temperature          0 for the most probable token each time; sampling divides the logits by it
    top_k, top_p         sample from the k most probable tokens (0: all), from the nucleus of probability p (1: all)
    stop                 ids that end a sequence
    seed                 with the sequence's index and the token's position it fixes each draw, whatever the other sequences are
    pad                  the id that fills the slots before shorter prompts and behind shorter inputs; it is never attended to
    remember, inputs     of an encoder-decoder: the network's function, and what the encoder reads for each prompt

    ValueError for an empty prompt, for one that leaves no room under max_length, and for settings out of their range.
    """
    check(prompts, max_new_tokens, max_length, seed)
    sample.check(temperature, top_k, top_p)
    if (remember is None) != (inputs is None):
        raise ValueError("An encoder-decoder generates with `remember` and `inputs`, and another network with neither. Pass both or none.")
    if inputs is not None:
        check_inputs(inputs, len(prompts), max_length)
    if not prompts:
        return []
    choose = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p))
    tokens, segments = pad_left(prompts, pad)
    read = None if inputs is None else pad_right(inputs, pad)
    stops, start = np.array(stop, np.int32), np.uint32(seed)
    new_BN = _decode(extend, empty_cache, remember, choose, max_new_tokens, params, tokens, segments, read, stops, start)
    return [until(row, stop) for row in mesh.gather(new_BN).tolist()]


def check(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_length: int | None, seed: int) -> None:
    """ValueError for requests that cannot be answered."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be positive. Set the number of tokens to generate.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie in [0, 2**32). Set another seed.")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] is empty, and there is nothing to continue. Begin it with the tokenizer's BOS token.")
        if max_length is not None and len(prompt) + max_new_tokens > max_length:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that exceeds max_length={max_length}. "
                "Shorten the prompt or lower max_new_tokens."
            )


def check_inputs(inputs: Sequence[Sequence[int]], count: int, max_length: int | None) -> None:
    """ValueError for inputs that the encoder cannot read."""
    if len(inputs) != count:
        raise ValueError(f"There are {len(inputs)} inputs for {count} prompts. Pass one for each.")
    for index, tokens in enumerate(inputs):
        if len(tokens) == 0:
            raise ValueError(f"inputs[{index}] is empty, and there is nothing to answer. Put at least the tokenizer's end token there.")
        if max_length is not None and len(tokens) > max_length:
            raise ValueError(f"inputs[{index}] has {len(tokens)} tokens, which exceeds max_length={max_length}. Shorten it.")


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), both [B, T] int32: the prompts end in the last slot; segment 0 marks the padding before them."""
    slots = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    tokens_BT = np.full((len(prompts), slots), pad, np.int32)
    segments_BT = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, slots - len(prompt) :] = prompt
        segments_BT[row, slots - len(prompt) :] = 1
    return tokens_BT, segments_BT


def pad_right(inputs: Sequence[Sequence[int]], pad: int) -> Inputs:
    """What an encoder reads, each [B, S] int32; segment 0 marks the padding behind."""
    slots = -(-max(map(len, inputs)) // BUCKET) * BUCKET
    tokens_BS = np.full((len(inputs), slots), pad, np.int32)
    segments_BS = np.zeros((len(inputs), slots), np.int32)
    for row, tokens in enumerate(inputs):
        tokens_BS[row, : len(tokens)] = tokens
        segments_BS[row, : len(tokens)] = 1
    return Inputs(tokens_BS, segments_BS, (segments_BS.cumsum(axis=1, dtype=np.int32) - 1).clip(0))


def until(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """The tokens before the first stop token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop), len(tokens))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _decode(extend, empty_cache, remember, choose, max_new_tokens, params, tokens_BT, segments_BT, inputs, stop_S, seed):
    """New tokens, [B, N] int32; what stands after a stop token, or after the loop's end, means nothing."""
    batch, slots = tokens_BT.shape

    def following(tokens_BT, positions_BT, segments_BT, cache):
        """The token after these, and the cache with these. Only the last slot goes through the head."""
        hidden_BTD, head, cache = extend(params, tokens_BT, positions_BT, segments_BT, cache)
        keys_B = sample.token_keys(seed, positions_BT[:, -1] + 1)
        return sample.choose(head(hidden_BTD[:, -1]), keys_B, **dict(choose)), cache

    def unfinished(carry):
        n, done_B, *_ = carry
        return (n < max_new_tokens) & ~done_B.all()

    def one_more(carry):
        n, done_B, last_B, new_BN, cache = carry
        position_B1 = positions_BT[:, -1:] + n
        next_B, cache = following(last_B[:, None], position_B1, jnp.ones_like(position_B1), cache)
        return n + 1, done_B | jnp.isin(next_B, stop_S), next_B, new_BN.at[:, n].set(next_B), cache

    positions_BT = (segments_BT.cumsum(axis=1) - 1).clip(0)
    cache = empty_cache(batch, slots + max_new_tokens)
    if inputs is not None:
        cache = remember(params, inputs, cache)
    first_B, cache = following(tokens_BT, positions_BT, segments_BT, cache)
    new_BN = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first_B)
    return jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), jnp.isin(first_B, stop_S), first_B, new_BN, cache))[3]
