"""Where a model comes from: a published checkpoint, or a fresh network over a tokenizer's vocabulary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tuning.core.parts import Part
from tuning.data.reader import Reader
from tuning.hub import checkpoint, families, files, tokenizer
from tuning.hub.family import Config as Architecture
from tuning.hub.names import Table
from tuning.models.heads import HeadConfig
from tuning.models.recurrent import RecurrentConfig
from tuning.models.transformer import TransformerConfig
from tuning.nn.block import Kind
from tuning.nn.storage import Storage


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    config     its architecture, and how it computes
    directory  the published checkpoint, or None for a fresh model
    published  that checkpoint's config.json, with the head that was asked for; or None
    adapter    a PEFT directory to start the method from, or None
    path       what the user wrote, for records
    fresh      the leaves of a head that the checkpoint does not have: they learn under every method
    storage    what the kernels in its layers are kept as where they do not learn; None for arrays
    attention  the form of attention that was asked for; see nn/kernels.py
    """

    config: Architecture
    tokenizer: Any
    directory: Path | None = None
    published: dict[str, Any] | None = None
    adapter: Path | None = None
    path: str = ""
    revision: str | None = None
    fresh: frozenset[str] = frozenset()
    storage: Storage | None = None
    attention: str = "auto"

    @property
    def table(self) -> Table:
        """Where the leaves stand in published checkpoints."""
        return families.table(self.published or families.config_to(self.config))

    @property
    def reader(self) -> Reader:
        """How examples are laid out for this model. ValueError if it has no tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"{self.path!r} has no tokenizer files, and training reads text. Add tokenizer.json or tokenizer.model there.")
        head = self.config.head
        return Reader(
            self.tokenizer, kind=self.config.reads, classes=head.classes, per_token=bool(head.classes) and not head.pool,
            pool="last" if head.pool == "last" else "first", start=self.config.start,
        )  # fmt: skip


def pretrained(
    described: bool = False,
    /,
    *,
    path: str,
    revision: str | None = None,
    adapter: str | None = None,
    head: str = "",
    classes: tuple[str, ...] = (),
    added_tokens: tuple[str, ...] = (),
    dropout: float | None = None,
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
    attention: str = "auto",
    quantise: str = "",
    quantise_block: int = 64,
    quantise_scales: bool = True,
    quantise_except: tuple[str, ...] = (),
) -> Source:
    """A published model: a local folder, or a hub id. Where it is `described`, nothing but its config.json is read, for plans: there is no
    tokenizer, a head of another class counts as new, and an adapter is not looked at.

    adapter       a PEFT directory whose values the method starts from (its rank, alpha and targets must be those of the method)
    head          what to put on top in place of the checkpoint's own: language_model, masked_language_model, sequence_classification,
                  token_classification, question_answering or none; "" keeps it. What the checkpoint has no weights for starts at random
                  and learns under every method
    classes       the names of a classifier's classes
    added_tokens  new tokens; their embedding rows start at the mean of the others and learn under every method
    dropout       while training, of the embedding, of what each sublayer adds, inside feed-forward layers and of attention shares; None
                  keeps the checkpoint's own
    dtype         of the computation and of frozen weights; tuned leaves and optimiser state are float32
    precision     of float32 matmuls on GPU and TPU: "highest" is exact, "default" is faster
    remat         what the backward pass keeps: "none" (everything), "dots" (matmul results), "full" (each layer's input)
    attention     how: "splash" (TPU), "cudnn" (GPU, bfloat16) or "blockwise" (anywhere, for everything); "auto" takes the TPU's kernel
                  where it can be had. "splash_interpreted" is splash on any device, slowly
    quantise      what the kernels in layers are kept as that do not learn: "nf4" (QLoRA: Dettmers et al., 2023, arXiv:2305.14314), "int4",
                  "int8", or "" for arrays of `dtype`
    quantise_block, quantise_scales  values that share a scale, and whether the scales are quantised too ("double quantisation")
    quantise_except  `target=kind`, as in ("mlp/down=int8", "attn/.*=none"): other kinds for the projections named; the first match counts
    """
    directory = None if described else files.resolve(path, revision)
    published = checkpoint.read_config(directory) if directory else checkpoint.describe(path, revision)
    words = tokenizer.load(directory) if directory else None
    published, fresh = _headed(published, directory, head, classes) if head or classes else (published, frozenset())
    config = families.config_from(published)
    fresh -= {"head/kernel"} if config.tied and config.head.output == "vocabulary" else frozenset()
    if added_tokens:
        config = config.replace(added=_add(added_tokens, words, directory) if directory else (config.vocab_size, len(added_tokens)))
    config = config.replace(dtype=dtype, precision=precision, remat=remat)
    if dropout is not None:
        config = config.with_dropout(dropout)
    if quantise_except and not quantise:
        raise ValueError(
            f"model.quantise_except={quantise_except}: they are exceptions from model.quantise, which is not set. Set it to nf4."
        )
    storage = Storage(quantise, quantise_block, quantise_scales, tuple(quantise_except)) if quantise else None
    adapted = files.resolve(adapter) if adapter and directory else None
    return Source(config, words, directory, published, adapted, path, revision, fresh, storage, attention)


def _headed(
    published: dict[str, Any], directory: Path | None, head: str, classes: tuple[str, ...]
) -> tuple[dict[str, Any], frozenset[str]]:
    """(config.json with another head, those of its leaves that the checkpoint does not have)."""
    changed = families.with_head(published, head, classes)
    there = checkpoint.opened(directory, changed) if directory else {row.tensor for row in families.form(published).table}
    return changed, frozenset(row.leaf for row in families.form(changed).table if row.tensor not in there)


def _add(tokens: tuple[str, ...], words: Any, directory: Path) -> tuple[int, int]:
    """Adds tokens to the tokenizer; (id of the first, how many)."""
    if words is None:
        raise ValueError(f"model.added_tokens={tokens}, but {directory} has no tokenizer to add them to.")
    first = len(words)
    count = words.add_tokens(list(tokens), special_tokens=True)
    if count != len(tokens):
        raise ValueError(f"model.added_tokens={tokens}: {len(tokens) - count} of them are tokens already.")
    return first, count


def decoder(
    *,
    tokenizer: str,
    width: int = 256,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 64,
    hidden: int = 1024,
    max_length: int = 2048,
    rope_theta: float = 10_000.0,
    window: int | None = None,
    tied: bool = True,
    qk_norm: bool = False,
    classes: tuple[str, ...] = (),
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
    attention: str = "auto",
) -> Source:
    """A fresh Llama-shaped model over the vocabulary of a tokenizer (a folder or hub id): a language model or, with `classes`, a classifier
    of texts. See TransformerConfig for the other keys, and `pretrained` for attention."""
    words = load_tokenizer(tokenizer)
    config = TransformerConfig(
        vocab_size=len(words), width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, hidden=hidden,
        max_length=max_length, rope_theta=rope_theta, kinds=(Kind(window=window),) * layers, tied=tied, qk_norm="head" if qk_norm else "",
        head=_head(classes, "last", bias=False), dtype=dtype, precision=precision, remat=remat,
    )  # fmt: skip
    return Source(config, words, path=tokenizer, attention=attention)


def encoder_decoder(
    *,
    tokenizer: str,
    width: int = 256,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 64,
    hidden: int = 1024,
    tied: bool = True,
    dropout: float = 0.0,
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
) -> Source:
    """A fresh model of the shape of T5 1.1 over the vocabulary of a tokenizer, `layers` in its encoder and as many in its decoder."""
    words = load_tokenizer(tokenizer)
    start = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    raw = {
        "vocab_size": len(words), "d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": head_dim, "d_ff": hidden,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": tied, "dropout_rate": dropout, "decoder_start_token_id": start,
        "model_type": "t5",
    }  # fmt: skip
    config = families.config_from(raw).replace(dtype=dtype, precision=precision, remat=remat)
    return Source(config, words, path=tokenizer)


def recurrent(
    *,
    tokenizer: str,
    cell: str = "lstm",
    width: int = 256,
    hidden: int = 256,
    layers: int = 2,
    bidirectional: bool = False,
    dropout: float = 0.0,
    classes: tuple[str, ...] = (),
    per_token: bool = False,
    max_length: int = 2048,
    tied: bool = False,
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
) -> Source:
    """A fresh LSTM or GRU over the vocabulary of a tokenizer: a language model or, with `classes`, a classifier of texts, or of each of
    their tokens (`per_token`); see RecurrentConfig for the other keys."""
    words = load_tokenizer(tokenizer)
    pool = "" if per_token else "mean" if bidirectional else "last"
    config = RecurrentConfig(
        vocab_size=len(words), width=width, hidden=hidden, layers=layers, cell=cell, bidirectional=bidirectional, dropout=dropout,
        max_length=max_length, head=_head(classes, pool, bias=True),
        tied=tied, dtype=dtype, precision=precision, remat=remat,
    )  # fmt: skip
    return Source(config, words, path=tokenizer)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id. ValueError if there is none."""
    words = tokenizer.load(files.resolve(path))
    if words is None:
        raise ValueError(f"{path!r} has no tokenizer: a tokenizer.json or a SentencePiece tokenizer.model is needed.")
    return words


def _head(classes: tuple[str, ...], pool: str, bias: bool) -> HeadConfig:
    """A classifier or, without classes, a language model's head."""
    return HeadConfig(output="classes", classes=tuple(classes), pool=pool, bias=bias) if classes else HeadConfig()


# To add a place that models come from: write its function, add one line here.
SOURCES: dict[str, Part] = {
    "pretrained": pretrained,
    "decoder": decoder,
    "encoder_decoder": encoder_decoder,
    "recurrent": recurrent,
}
