"""A model to use: `load` it from a run, a folder or a hub id; look at its logits, generate, score, export."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tuning import build, export
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch, Tree
from tuning.decode.generate import generate
from tuning.hub import adapters, files, tokenizer
from tuning.methods import METHODS
from tuning.models.decoder import DecoderConfig
from tuning.objectives.tokens import token_nll
from tuning.training import workdir
from tuning.training.checkpoint import Checkpoints


def stop_ids(source: build.Source) -> tuple[int, ...]:
    """The tokens that end a text."""
    return tokenizer.stop_ids(source.directory, source.tokenizer)


def load(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    checkpoint: str | int = "best",
    revision: str | None = None,
) -> LoadedModel:
    """A model to use: a run's directory, a published checkpoint's, or a hub id, with or without a PEFT adapter.

    dtype       of the computation and of the weights
    mesh        where it lives; one device by default
    checkpoint  of a run: "best" (lowest evaluation loss; the last one if none was evaluated), "last", or a step
    """
    where = meshes.over(jax.devices()[:1]) if mesh is None else mesh
    path = Path(path_or_id)
    with jax.set_mesh(where):
        if workdir.is_run(path):
            if adapter is not None:
                raise ValueError(f"{path} is a run, which has its own weights; an adapter goes on a published model.")
            return _load_run(path, dtype, where, checkpoint)
        source = build.pretrained(path=str(path_or_id), revision=revision, dtype=dtype)
        found: dict[str, Any] = {}
        if adapter is None:
            method = METHODS["full"](build.outline(source))
            m = build.model(source, method, where, masters=dtype)
            params = build.base_params(m, lambda name: True, 0)
        else:
            directory = files.resolve(adapter)
            found = adapters.settings(directory, source.table)
            source = dataclasses.replace(source, config=dataclasses.replace(source.config, added=found.pop("added")))
            del found["layers"]  # an adapter that covers some layers only is refused when it is read
            m = build.model(source, METHODS["lora"](build.outline(source), **found), where, masters=dtype)
            params = build.with_adapter(m, build.base_params(m, lambda name: True, 0), directory)
    return LoadedModel(m, params, stop_ids(source), found and {"name": "lora", **found})


def _load_run(path: Path, dtype: str, where: Mesh, which: str | int) -> LoadedModel:
    config = build.resolve(workdir.read_config(path))
    config["model"]["dtype"] = dtype
    source = configs.bind(build.SECTIONS, config, "model")()
    m = build.model(source, configs.bind(build.SECTIONS, config, "method")(build.outline(source)), where, masters=dtype)
    learns, _ = tree.split(m.layout, m.tuned)
    with contextlib.closing(Checkpoints(path / "checkpoints", read_only=True)) as checkpoints:
        evaluated = checkpoints.best() is not None
        _, tuned, _, _ = checkpoints.restore("last" if which == "best" and not evaluated else which, learns, None)
    params = tree.merge(tuned, build.base_params(m, lambda name: not m.tuned(name), config["seed"]))
    return LoadedModel(m, params, stop_ids(source), config["method"])


class LoadedModel:
    """A model with its parameters, to look at and to use.

    config     its architecture (DecoderConfig)
    params     nested dict of arrays, by leaf name
    tokenizer  or None, where the checkpoint has none: then only the calls that take text raise
    """

    def __init__(self, model: build.Model, params: Tree, stop: tuple[int, ...], method: Mapping[str, Any] | None = None):
        self.model, self.params, self.stop = model, params, stop
        self.method = dict(method or {"name": "full"})
        self._logits = jax.jit(self._forward)

    @property
    def config(self) -> DecoderConfig:
        return self.model.source.config

    @property
    def tokenizer(self) -> Any:
        if self.model.source.tokenizer is None:
            raise ValueError(
                f"{self.model.source.path!r} has no tokenizer files; this call takes text. Add tokenizer.json or tokenizer.model."
            )
        return self.model.source.tokenizer

    def _forward(self, params: Tree, tokens_BT, mask_BT):
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
        batch = Batch(tokens_BT, tokens_BT, mask_BT, mask_BT, positions_BT)
        hidden, head, _ = self.model.network.apply(params, batch)
        return head(hidden)

    def logits(self, tokens_BT, attention_mask_BT=None) -> jax.Array:
        """[B, T] token ids -> [B, T, V] float32 logits; the mask is 1 on tokens, 0 on padding (on either side)."""
        tokens = jnp.asarray(np.asarray(tokens_BT), jnp.int32)
        mask = jnp.ones_like(tokens) if attention_mask_BT is None else jnp.asarray(np.asarray(attention_mask_BT), jnp.int32)
        if tokens.ndim != 2 or mask.shape != tokens.shape:
            raise ValueError(f"logits takes [B, T] token ids and a mask of the same shape; got {tokens.shape} and {mask.shape}.")
        with jax.set_mesh(self.model.mesh):
            return self._logits(self.params, tokens, mask)

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0, special_tokens: bool = True,
    ) -> list[str]:  # fmt: skip
        """Continuations of the prompts, without them; greedy at temperature 0. Each ends at an end token or after max_new_tokens.

        special_tokens  whether the tokenizer puts its own around a prompt; not for text that a chat template has rendered
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [open_ended(self.tokenizer, text, special_tokens) for text in texts]
        with jax.set_mesh(self.model.mesh):
            out = generate(
                self.model.network.extend, self.model.empty_cache, self.params, ids, max_new_tokens=max_new_tokens, temperature=temperature,
                top_k=top_k, top_p=top_p, stop=self.stop, seed=seed, max_length=self.config.max_length,
            )  # fmt: skip
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out]

    def chat_prompt(self, message: str) -> str:
        """A user's message in the model's chat template, up to where the assistant begins."""
        return self.tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Mean negative log-likelihood per token (nats) of each text; its first token is not scored."""
        ids = [self.tokenizer(text)["input_ids"] for text in ([texts] if isinstance(texts, str) else texts)]
        if short := [i for i, tokens in enumerate(ids) if len(tokens) < 2]:
            raise ValueError(f"Text {short[0]} has fewer than two tokens: nothing in it can be predicted.")
        with jax.set_mesh(self.model.mesh):
            return [float(_score(self.model.network, self.params, tokens)) for tokens in ids]

    def export(self, directory: str | Path, format: str = "hf", merge: bool = False) -> Path:
        """Writes the model for others: "hf" is a directory that transformers loads, "peft" the adapter alone, as PEFT has it.

        An adapter goes into an "hf" export only when `merge` says so; the logits of both are compared first.
        """
        return export.write(self.model, self.params, self.method, Path(directory), format, merge)


def open_ended(words: Any, text: str, special_tokens: bool) -> list[int]:
    """A prompt's tokens, without an end token that the tokenizer may put behind every text."""
    ids = list(words(text, add_special_tokens=special_tokens)["input_ids"])
    return ids[:-1] if special_tokens and ids and ids[-1] == words.eos_token_id else ids


def _score(network, params: Tree, ids: Sequence[int]) -> jax.Array:
    size = max(32, 1 << (len(ids) - 1).bit_length())  # few shapes, few compilations
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids)] = ids
    real = (np.arange(size) < len(ids)).astype(np.int32)[None]
    return _score_padded(network, params, jnp.asarray(tokens), jnp.asarray(real))


@jax.jit(static_argnums=0)
def _score_padded(network, params: Tree, tokens_BT, real_BT):
    targets_BT, counts_BT = jnp.roll(tokens_BT, -1, axis=1), jnp.roll(real_BT, -1, axis=1).at[:, -1].set(0)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, head, _ = network.apply(params, Batch(tokens_BT, targets_BT, counts_BT, real_BT, positions_BT))
    return (token_nll(head, hidden, targets_BT) * counts_BT).sum() / counts_BT.sum()
