"""A model to use: `load` it from a run, a folder or a hub id; look at its logits, generate, score, export."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tuning import adapted, build, export, weights
from tuning.adapted import Adapted
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import parts, tree
from tuning.core.types import Batch, Inputs, Tree
from tuning.data.frame import frame
from tuning.decode.generate import generate
from tuning.hub import files, sentences, tokenizer
from tuning.methods.combine import Recipe
from tuning.methods.method import added
from tuning.objectives.tokens import token_nll
from tuning.source import Source, pretrained
from tuning.training import workdir
from tuning.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)


def stop_ids(source: Source) -> tuple[int, ...]:
    """The tokens that end a text."""
    return tokenizer.stop_ids(source.directory, source.tokenizer)


def load(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    checkpoint: str | int = "best",
    revision: str | None = None,
    quantise: str = "",
) -> LoadedModel:
    """A model to use: a run's directory, a published checkpoint's, or a hub id, with or without a PEFT adapter.

    dtype       of the computation and of the weights
    mesh        where it lives; one device by default
    checkpoint  of a run: "best" (lowest evaluation loss; the last one if none was evaluated), "last", or a step
    quantise    what the kernels of a published model are kept as: nf4, int4, int8, or "" for arrays; a run knows it by itself
    """
    where = meshes.over(jax.devices()[:1]) if mesh is None else mesh
    path = Path(path_or_id)
    with jax.set_mesh(where):
        if quantise and workdir.is_run(path):
            raise ValueError(f"quantise={quantise!r}: {path} is a run, which keeps its base as model.quantise said. Leave it out.")
        if workdir.is_run(path):
            if adapter is not None:
                raise ValueError(f"{path} is a run, which has its own weights; an adapter goes on a published model.")
            return _load_run(path, dtype, where, checkpoint)
        source = pretrained(path=str(path_or_id), revision=revision, dtype=dtype, quantise=quantise)
        one = adapted.bare(source, where) if adapter is None else adapted.read(source, files.resolve(adapter), where)
        return LoadedModel(one.model, adapted.params(one, {}), stop_ids(source), one.method)


def _load_run(path: Path, dtype: str, where: Mesh, which: str | int) -> LoadedModel:
    config = build.resolve(workdir.read_config(path))
    config["model"]["dtype"] = dtype
    source = configs.bind(build.SECTIONS, config, "model")()
    m = build.model(source, configs.bind(build.SECTIONS, config, "method")(build.outline(source)), where, masters=dtype)
    learns, _ = tree.split(m.layout, m.tuned)
    with contextlib.closing(Checkpoints(path / "checkpoints", read_only=True)) as checkpoints:
        evaluated = checkpoints.best() is not None
        step, tuned, _, _ = checkpoints.restore("last" if which == "best" and not evaluated else which, learns, None)
    params = tree.merge(tuned, weights.base_params(m, lambda name: not m.tuned(name), config["seed"]))
    return LoadedModel(m, params, stop_ids(source), config["method"], path, step)


class LoadedModel:
    """A model with its parameters, to look at and to use; over its base there may be several adapters, of which one at a time is active.

    config     its architecture (a TransformerConfig, an EncoderDecoderConfig or a RecurrentConfig)
    params     nested dict of arrays, by leaf name
    tokenizer  or None, where the checkpoint has none: then only the calls that take text raise
    active     the name of the adapter in use, "default" for one that was loaded with the model; None for the base alone
    """

    def __init__(
        self, model: build.Model, params: Tree, stop: tuple[int, ...], method: Mapping[str, Any] | None = None, run: Path | None = None,
        step: int | None = None,
    ):  # fmt: skip
        self.model, self.params, self.stop, self.run, self.step = model, params, stop, run, step
        self.method, leaves = dict(method or adapted.BARE), tree.flatten(params)
        over = any(map(added, leaves)) or (run is None and self.method["name"] == "partial")  # norms that PEFT tuned
        own = {name: x for name, x in leaves.items() if over and model.tuned(name)}
        self.active: str | None = "default" if over else None
        self._loaded, self._base = self.active, {name: x for name, x in leaves.items() if name not in own}
        self._adapted: dict[str | None, Adapted] = {self.active: Adapted(model, self.method, own, model.source.fresh)}

    @property
    def config(self) -> Any:
        return self.model.source.config

    @property
    def tokenizer(self) -> Any:
        if self.model.source.tokenizer is None:
            raise ValueError(
                f"{self.model.source.path!r} has no tokenizer files; this call takes text. Add tokenizer.json or tokenizer.model."
            )
        return self.model.source.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(name for name in self._adapted if name is not None)

    def add(self, name: str, directory: str | Path) -> None:
        """Reads a further PEFT directory over the same base. It may be of another method, rank or place; `use` takes it into use."""
        source = self._under(name)
        with jax.set_mesh(self.model.mesh):
            self._adapted[name] = adapted.read(source, files.resolve(directory), self.model.mesh, self._adapted.values())

    def use(self, name: str | None) -> None:
        """Switches to another adapter, or to the base alone. What was compiled for adapters of the same settings is not compiled again."""
        if name is not None:
            self._check(name)
        elif None not in self._adapted:
            self._adapted[None] = adapted.bare(self._base_source(), self.model.mesh)
        one = self._adapted[name]
        with jax.set_mesh(self.model.mesh):
            self.params = adapted.params(one, self._base)
        self.model, self.method, self.active = one.model, one.method, name

    def combine(self, name: str, weights: Mapping[str, float], **recipe: Any) -> None:
        """Makes an adapter of those that `weights` names; the keys are those of Recipe: how, density, majority_sign_method, svd_rank, seed.

        `combine("both", {"a": 0.5, "b": 0.5}, how="ties", density=0.2)`
        """
        how, source = Recipe(**recipe), self._under(name)
        self._check(*weights)
        chosen = [self._adapted[other] for other in weights]
        with jax.set_mesh(self.model.mesh):
            self._adapted[name] = adapted.combined(source, chosen, list(weights.values()), how, self._base, self._adapted.values())

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.names:
                there = ", ".join(self.names) or "none"
                raise ValueError(f"There is no adapter {name!r}.{parts.suggestion(str(name), self.names)} There are: {there}.")

    def _under(self, name: str) -> Source:
        """Where the base of a new adapter comes from. ValueError if it has another one's name, or no base that others know."""
        if name in self.names:
            raise ValueError(f"There is an adapter {name!r} already. Take another name.")
        if self.run is not None and self._loaded is None:
            raise ValueError(f"{self.run} changed the weights of its base. Export it as it is, with --format=hf, and load that.")
        return self._base_source()

    def _base_source(self) -> Source:
        first = self._adapted[self._loaded]
        if more := [name for name in first.own if not added(name)]:
            raise ValueError(
                f"With the adapter, {tree.listing(more)} came into the model. Load the base alone, and add the adapter to that."
            )
        return first.model.source

    def logits(self, tokens_BT, attention_mask_BT=None, *, types_BT=None, decoder_tokens_BT=None) -> jax.Array:
        """[B, T] token ids -> float32 logits: [B, T, V] over the vocabulary, [B, T, C] or, of a sequence classifier, [B, C] over classes.

        attention_mask_BT  1 on tokens, 0 on padding (on either side)
        types_BT           which of two texts a token belongs to, for encoders that tell
        decoder_tokens_BT  what the decoder of an encoder-decoder reads (not padded), and the logits are for; the tokens are the encoder's
        """
        free = lambda array, value: jnp.pad(array, ((0, 0), (self.model.method.slots, 0)), constant_values=value)  # noqa: E731
        tokens, mask = (free(array, value) for array, value in zip(_ids(tokens_BT, attention_mask_BT), (0, 1), strict=True))
        batch = Batch(tokens, tokens, mask, mask, places(mask), None if types_BT is None else free(_ids(types_BT)[0], 0))
        if (self.config.reads == "encoder_decoder") != (decoder_tokens_BT is not None):
            raise ValueError(f"decoder_tokens_BT is for an encoder-decoder, and this model is an {self.config.reads}: give it there only.")
        if decoder_tokens_BT is not None:
            read, ones = _ids(decoder_tokens_BT)
            batch = Batch(read, read, ones, ones, places(ones), None, Inputs(tokens, mask, places(mask)))
        with jax.set_mesh(self.model.mesh):
            return _logits(self.model.network, self.config.head.pool, self.model.method.slots, self.params, batch)

    def classify(self, texts: str | Sequence[str]) -> list[dict[str, float]]:
        """The probability of each class, for each text; of a model with a sequence classifier."""
        classes, pool = self.config.head.classes, self.config.head.pool
        if not classes or not pool:
            raise ValueError("classify is for a model whose head classifies a sequence; see model.head.")
        rows = [f.tokens for f in frame(self.tokenizer).encode(_listed(texts))]
        tokens, mask = _pad(rows, self.config.max_length)
        shares = jax.nn.softmax(self.logits(tokens, mask), axis=-1)
        return [dict(zip(classes, map(float, row), strict=True)) for row in np.asarray(shares)[: len(rows)]]

    def embed(self, texts: str | Sequence[str], batch_size: int = 32) -> np.ndarray:
        """[B, D] float32 embeddings of the texts, pooled and normalised as the checkpoint's modules.json says.

        Longer texts than it was made for are cut, with a warning. ValueError for a checkpoint that says nothing of it.
        """
        source = self.model.source
        how = sentences.read(source.directory) if source.directory else None
        if how is None:
            raise ValueError(f"{source.path!r} is no sentence encoder: it has no modules.json, which says how tokens become one embedding.")
        if self.model.method.slots:
            raise ValueError("embed does not know which of a prompt's own positions a sentence's embedding should count.")
        if self.config.head.pool == "mean":
            raise ValueError("This head has averaged the hidden states already. Load the checkpoint with model.head=none to embed.")
        plain, around = [text.strip() for text in _listed(texts)], frame(self.tokenizer)
        rows = [f.tokens for f in around.encode([text.lower() if how.lower else text for text in plain])]
        longest = min(how.max_tokens or self.config.max_length, self.config.max_length)
        if cut := sum(len(row) > longest for row in rows):
            log.warning("%d of %d texts are longer than the %d tokens that the encoder reads, and are cut.", cut, len(rows), longest)
            rows = [row[around.trim(row, longest)] for row in rows]
        found = []
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            tokens, mask = _pad(some, longest)
            with jax.set_mesh(self.model.mesh):
                found.append(np.asarray(_embed(self.model.network, how, self.params, tokens, mask))[: len(some)])
        return np.concatenate(found)

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0, special_tokens: bool = True,
    ) -> list[str]:  # fmt: skip
        """Continuations of the prompts, without them; greedy at temperature 0. Each ends at an end token or after max_new_tokens.

        special_tokens  whether the tokenizer puts its own around a prompt; not for text that a chat template has rendered
        """
        if self.config.head.output != "vocabulary" or self.config.reads == "encoder":
            raise ValueError(f"This model does not generate: it is an {self.config.reads} with a head over {self.config.head.output}.")
        texts, net, free = _listed(prompts), self.model.network, [0] * self.model.method.slots
        more: dict[str, Any] = {}
        if self.config.reads == "encoder_decoder":  # the prompts are the encoder's to read
            if self.config.start is None:
                raise ValueError("An encoder-decoder starts from a token that config.json does not name. Set decoder_start_token_id there.")
            inputs = [free + self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"] for text in texts]
            more = dict(remember=net.remember, inputs=inputs)
            ids = [[self.config.start]] * len(texts)
        else:
            ids = [free + open_ended(self.tokenizer, text, special_tokens) for text in texts]
        with jax.set_mesh(self.model.mesh):
            out = generate(
                net.extend, self.model.empty_cache, self.params, ids, max_new_tokens=max_new_tokens, temperature=temperature,
                top_k=top_k, top_p=top_p, stop=self.stop, seed=seed, max_length=self.config.max_length - self.model.method.sites.offset,
                **more,
            )  # fmt: skip
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out]

    def chat_prompt(self, message: str) -> str:
        """A user's message in the model's chat template, up to where the assistant begins."""
        return self.tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Mean negative log-likelihood per token (nats) of each text; its first token is not scored."""
        if self.config.head.output != "vocabulary" or self.config.reads != "decoder":
            raise ValueError(f"score is for decoders that say what follows; this is an {self.config.reads} over {self.config.head.output}.")
        ids = [self.tokenizer(text)["input_ids"] for text in _listed(texts)]
        if short := [i for i, tokens in enumerate(ids) if len(tokens) < 2]:
            raise ValueError(f"Text {short[0]} has fewer than two tokens: nothing in it can be predicted.")
        with jax.set_mesh(self.model.mesh):
            return [float(_score(self.model.network, self.params, tokens, self.model.method.slots)) for tokens in ids]

    def export(self, directory: str | Path, format: str = "hf", merge: bool = False, shard_bytes: int = files.SHARD_BYTES) -> Path:
        """Writes the model for others: "hf" is a directory that transformers loads, "peft" the adapter alone, as PEFT has it.

        An adapter goes into an "hf" export only when `merge` says so; the logits of both are compared first. A file of weights that would
        be larger than `shard_bytes` is written as several.
        """
        run, step = (self.run, self.step) if self.active == self._loaded else (None, None)
        return export.write(self.model, self.params, self.method, Path(directory), format, merge, run, step, shard_bytes)


def _listed(texts: str | Sequence[str]) -> list[str]:
    if not (found := [texts] if isinstance(texts, str) else list(texts)):
        raise ValueError("There is no text: the list is empty.")
    return found


@jax.jit(static_argnums=(0, 1, 2))
def _logits(network, pool: str, slots: int, params: Tree, batch: Batch):
    hidden_BTD, head, _ = network.apply(params, batch)
    if not pool and batch.inputs is None:
        hidden_BTD = hidden_BTD[:, slots:]
    return head(pooled(hidden_BTD, batch.segments, pool))


def pooled(hidden_BTD: jax.Array, mask_BT: jax.Array, pool: str) -> jax.Array:
    """[B, D], the hidden state that stands for each sequence; all of them where each token has its own answer."""
    if not pool:
        return hidden_BTD
    last = mask_BT.shape[1] - 1 - jnp.argmax(mask_BT[:, ::-1] != 0, axis=1)
    at = last if pool == "last" else jnp.argmax(mask_BT != 0, axis=1)  # a mean stands at every token
    return jnp.take_along_axis(hidden_BTD, at[:, None, None], axis=1)[:, 0]


def places(mask_BT: jax.Array) -> jax.Array:
    """Positions of the tokens in their sequence, 0 for padding before them."""
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)


def _ids(tokens_BT: Any, mask_BT: Any = None) -> tuple[jax.Array, jax.Array]:
    tokens = jnp.asarray(np.asarray(tokens_BT), jnp.int32)
    mask = jnp.ones_like(tokens) if mask_BT is None else jnp.asarray(np.asarray(mask_BT), jnp.int32)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(f"logits takes [B, T] token ids and a mask of the same shape; got {tokens.shape} and {mask.shape}.")
    return tokens, mask


def _pad(rows: Sequence[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of few shapes, so that texts of all lengths share a few compiled programs."""
    size = min(longest, max(16, 1 << (max(map(len, rows)) - 1).bit_length()))
    if too := [len(row) for row in rows if len(row) > size]:
        raise ValueError(f"A text has {too[0]} tokens, and the model reads at most {longest}. Shorten it.")
    tokens, mask = np.zeros((2, 1 << (len(rows) - 1).bit_length(), size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask


@jax.jit(static_argnums=(0, 1))
def _embed(network, how: sentences.Sentences, params: Tree, tokens_BT, mask_BT):
    batch = Batch(tokens_BT, tokens_BT, mask_BT, mask_BT, places(mask_BT))
    hidden_BTD, _, _ = network.apply(params, batch)
    return sentences.pool(hidden_BTD.astype(jnp.float32), mask_BT, how)


def open_ended(words: Any, text: str, special_tokens: bool) -> list[int]:
    """A prompt's tokens, without an end token that the tokenizer may put behind every text."""
    ids = list(words(text, add_special_tokens=special_tokens)["input_ids"])
    return ids[:-1] if special_tokens and ids and ids[-1] == words.eos_token_id else ids


def _score(network, params: Tree, ids: Sequence[int], slots: int) -> jax.Array:
    size = max(32, 1 << (slots + len(ids) - 1).bit_length())  # few shapes, few compilations
    tokens = np.zeros((1, size), np.int32)
    tokens[0, slots : slots + len(ids)] = ids
    real = (np.arange(size) < slots + len(ids)).astype(np.int32)[None]
    return _score_padded(network, slots, params, jnp.asarray(tokens), jnp.asarray(real))


@jax.jit(static_argnums=(0, 1))
def _score_padded(network, slots: int, params: Tree, tokens_BT, real_BT):
    targets_BT, counts_BT = jnp.roll(tokens_BT, -1, axis=1), jnp.roll(real_BT, -1, axis=1).at[:, -1].set(0).at[:, :slots].set(0)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, head, _ = network.apply(params, Batch(tokens_BT, targets_BT, counts_BT, real_BT, positions_BT))
    return (token_nll(head, hidden, targets_BT) * counts_BT).sum() / counts_BT.sum()
