"""Tokenizers of published checkpoints, as transformers' fast tokenizers. Nothing of a checkpoint is ever run.

A folder with only a SentencePiece model (Kudo and Richardson, 2018, arXiv:1808.06226) is converted here, without a network.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuning.hub import files

SPACE = "▁"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json")


def load(path_or_id: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a folder or a hub id, with its chat template; None if there are no tokenizer files.

    tokenizer.json is read as it is; a tokenizer.model alone is converted. ValueError for files of another kind.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch, which nobody here needs
    from transformers import PreTrainedTokenizerFast

    directory = files.resolve(path_or_id, revision)
    if (directory / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(directory))
    if (directory / "tokenizer.model").is_file():
        return _from_sentencepiece(directory)
    if others := [name for name in ("vocab.json", "vocab.txt", "merges.txt", "tekken.json") if (directory / name).is_file()]:
        raise ValueError(
            f"{directory} has {', '.join(others)}, but neither tokenizer.json nor tokenizer.model. Let transformers write tokenizer.json: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return None


def save(tokenizer: Any, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(os.fspath(directory))


def stop_ids(directory: Path | None, tokenizer: Any) -> tuple[int, ...]:
    """All ids that end a text, in order: the eos_token_id of generation_config.json and of config.json, and the tokenizer's own."""
    found: list[Any] = [None if tokenizer is None else tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if directory is not None and (directory / name).is_file():
            said = files.read_json(directory / name).get("eos_token_id")
            found.extend(said if isinstance(said, list) else [said])
    return tuple(sorted({int(i) for i in found if i is not None}))


def _from_sentencepiece(directory: Path) -> Any:
    """Converts tokenizer.model, and lets transformers read the folder's settings beside the result."""
    from transformers import PreTrainedTokenizerFast

    model = _parse(directory / "tokenizer.model")
    # Llama's convention: a text begins with <s>, if there is one, and is not ended.
    defaults: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    for name, index in (("bos", "bos_id"), ("eos", "eos_id"), ("unk", "unk_id"), ("pad", "pad_id")):
        if (i := getattr(model.trainer_spec, index)) >= 0:
            defaults[f"{name}_token"] = model.pieces[i].piece
    config = directory / "tokenizer_config.json"
    given = files.read_json(config) if config.is_file() else {}
    settings = {**defaults, **{key: value for key, value in given.items() if key not in ("tokenizer_class", "auto_map")}}
    with tempfile.TemporaryDirectory() as folder:
        for name in SETTINGS:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, Path(folder, name))
        files.write_json(Path(folder, "tokenizer_config.json"), settings)
        convert(model).save(str(Path(folder, "tokenizer.json")))
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    # transformers trusts a tokenizer.json, which knows nothing of these, above the settings.
    loaded.add_bos_token, loaded.add_eos_token = bool(settings["add_bos_token"]), bool(settings["add_eos_token"])
    loaded.name_or_path = str(directory)
    return loaded


def _parse(file: Path) -> Any:
    """The SentencePiece model as its protocol buffer. ValueError if it is something else."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError:
        raise ValueError(f"Reading {file} needs two packages: pip install sentencepiece protobuf.") from None
    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ValueError(f"{file} is not a SentencePiece model. Put the checkpoint's tokenizer.json beside it.")
    return model


def convert(model: Any) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of the SentencePiece model (a ModelProto). ValueError for what it cannot follow."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    spec, pieces = model.trainer_spec, list(model.pieces)
    refused = [p.piece for p in pieces if p.type in (USER_DEFINED, UNUSED)]
    if refused:
        raise ValueError(f"This SentencePiece model has user-defined or unused pieces ({refused[:4]}), which cannot be converted exactly.")
    if not model.normalizer_spec.escape_whitespaces or spec.treat_whitespace_as_suffix:
        raise ValueError("This SentencePiece model treats spaces in a way that cannot be converted exactly.")
    if spec.model_type == spec.UNIGRAM:
        vocabulary = [(p.piece, p.score) for p in pieces]
        core = models.Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    elif spec.model_type == spec.BPE:
        ids = {p.piece: i for i, p in enumerate(pieces)}
        unknown = pieces[spec.unk_id].piece
        core = models.BPE(ids, list(_merges(pieces)), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    else:
        raise ValueError("Only unigram and BPE models of SentencePiece are supported; this one splits into words or characters.")
    tokenizer = Tokenizer(core)
    if spec.model_type == spec.UNIGRAM:
        # Unlike SentencePiece, `tokenizers` would find a control token or a byte's name in plain text; breaking it up prevents that.
        names = [p.piece for p in pieces if p.type in (CONTROL, UNKNOWN, BYTE) and len(p.piece) > 1]
        broken = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(broken), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    normalizer = _normalizer(model.normalizer_spec)
    tokenizer.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    special = [p.piece for p in pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _merges(pieces: list[Any]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that make a piece, the best piece first: SentencePiece merges the pair whose result has the highest score."""
    known = {p.piece for p in pieces if p.type == NORMAL}
    for piece in sorted((p for p in pieces if p.type == NORMAL), key=lambda p: -p.score):
        text = piece.piece
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]


def _normalizer(spec: Any) -> Any:
    """SentencePiece's own steps, in its order: the character map, spaces, the space before the first word."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
