"""Files of published checkpoints: finding them, and reading and writing safetensors lazily.

The format (huggingface/safetensors, README): 8 bytes, the header's length as a little-endian integer; the header, a JSON object
{name: {dtype, shape, data_offsets}}; the tensors' bytes in that order, without gaps. Only the header is read to know what a file
holds; values are read slice by slice through a memory map.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 50_000_000  # the index of a checkpoint of a thousand billion parameters has some ten million
SHARD_BYTES = 5_000_000_000
WANTED = ["*.json", "*.safetensors", "*.jinja", "README.md"]
WANTED += ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "merges.txt"]
# Other layouts of the same weights. The folders that stay are the modules of sentence-transformers, such as 1_Pooling and 2_Dense.
UNWANTED = ["consolidated*", "[!1-9]*/*", "[1-9][!_]*/*", "*/*/*"]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRAINER_STATE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}


def resolve(path_or_id: str | os.PathLike, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The local folder of a checkpoint: a folder as it is, or a Hugging Face id such as `owner/name`, downloaded into the hub's cache.

    Only what is wanted is fetched: weights in safetensors, configurations, tokenizer files and the model card. ValueError if it is neither
    a folder nor a reachable id.
    """
    text = os.fspath(path_or_id)
    if (folder := Path(text).expanduser()).is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{text} is a file; give the folder that holds config.json and the weights.")
    why = "it does not look like a hub id (owner/name) either"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith("."):
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(text, revision=revision, allow_patterns=list(wanted), ignore_patterns=UNWANTED))
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
            at = f" at revision {revision!r}" if revision else ""
            why = f"the Hugging Face hub did not give {text!r}{at} ({type(error).__name__})"
    raise ValueError(
        f"{text!r}: there is no such folder (looked in {folder.absolute()}), and {why}. Check the spelling; for a private model set "
        "HF_TOKEN; without a network give a local folder."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError that names the file if it is not one, or larger than any that a checkpoint needs."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; JSON of more than {MAX_JSON_BYTES:,} is not read. It is not what its name says.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Indented, keys sorted: as the Hugging Face libraries write theirs."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Entry(NamedTuple):
    """One tensor of a file: `start` is its first byte."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


def read_header(file: Path) -> dict[str, Entry]:
    """{name: entry} of a safetensors file; no value is read. ValueError that names the file if the header and the file disagree."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands in it twice")
        return dict(pairs)

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise _broken(file, f"its header would be {length} bytes long in a file of {size} bytes")
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            entries = {name: _entry(file, 8 + length, name, info) for name, info in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(file, f"its header cannot be read: {error}") from None
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, _nbytes(item[1]))):
        if entry.start != position:
            raise _broken(file, f"tensor {name} begins at byte {entry.start}, expected {position}")
        position += _nbytes(entry)
    if position != size:
        raise _broken(file, f"its header describes {position} bytes, and it has {size}")
    return entries


def _entry(file: Path, base: int, name: str, info: dict[str, Any]) -> Entry:
    shape, (start, stop), code = tuple(info["shape"]), info["data_offsets"], info["dtype"]
    if code not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {code!r}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has the shape {shape} at {start} to {stop}")
    entry = Entry(file, base + start, shape, np.dtype(DTYPES[code]))
    if math.prod(max(n, 1) for n in shape) * entry.dtype.itemsize >= 2**63:  # a zero hides it from the count of bytes
        raise ValueError(f"tensor {name} has the shape {shape}, which no array can have")
    if stop - start != _nbytes(entry):
        raise ValueError(f"tensor {name} has {stop - start} bytes, and its shape {shape} in {code} needs {_nbytes(entry)}")
    return entry


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _broken(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is truncated or damaged: {why}. Fetch it again.")


class Tensors:
    """The tensors of a folder of safetensors files, by name: one file, or shards with an index. Values are read when asked for.

    `stem` is the files' name without its ending: `model` for weights, `adapter_model` for adapters.
    """

    def __init__(self, directory: Path, stem: str = "model"):
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for file in weight_files(directory, stem):
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise ValueError(f"Tensor {name} stands in two files: {self.entries[name].file} and {file}.")
                self.entries[name] = entry
        index = directory / f"{stem}.safetensors.index.json"
        if index.exists() and not (directory / f"{stem}.safetensors").exists():
            _check_index(index, self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self):
        return iter(self.entries)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names, {now: then}. ValueError if two would have the same."""
        renamed = {names.get(name, name): entry for name, entry in self.entries.items()}
        if len(renamed) < len(self.entries):
            raise ValueError(f"{self.directory} has the same tensor under two names: {', '.join(sorted(names))}.")
        self.entries = renamed

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.entries[name].dtype

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """The values at `index`, one slice per axis (all of them by default), in the file's dtype. Only their pages are touched."""
        return np.array(self.view(name, index))

    def view(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """As `read`, but still in the file: no memory is taken, and the values last no longer than the file does."""
        entry = self.entries[name]
        if 0 in entry.shape:
            return np.empty(entry.shape, entry.dtype)[tuple(index)]
        mapped = np.memmap(entry.file, np.uint8, "r", entry.start, (_nbytes(entry),))
        return np.asarray(mapped).view(entry.dtype).reshape(entry.shape)[tuple(index)]


def weight_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files that hold a checkpoint's weights. ValueError if there are none, or if one lies outside the folder."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [_inside(directory, single.name, "the folder")]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to file names.")
        return [_inside(directory, name, str(index)) for name in sorted(set(weight_map.values()))]
    if pickles := sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES and f.name not in TRAINER_STATE):
        raise ValueError(
            f"{directory} has weights only as pickles ({', '.join(pickles[:4])}), which can run code when they are opened and are never "
            "read here. Convert them where you trust them: in PyTorch, model.save_pretrained(folder) writes safetensors."
        )
    raise ValueError(f"{directory} has no weights: neither {single.name} nor {index.name} is in it.")


def _inside(directory: Path, name: str, said_by: str) -> Path:
    """The file of that name in the folder. ValueError for a path that leaves it, except into the blobs of the hub's own cache."""
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0") or not name.endswith(".safetensors"):
        raise ValueError(f"{said_by} names the file {name!r}; weights must be .safetensors files of the folder itself.")
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{file} is missing; {said_by} names it. The download or the copy is not complete.")
    real, home = file.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent not in (home, blobs):
        raise ValueError(f"{file} is a link to {real}, outside of its folder. Copy the file into the folder.")
    return file


def _check_index(index: Path, entries: dict[str, Entry]) -> None:
    """The index and the files must tell the same: a tensor that only one of them knows means mixed-up files."""
    for name, file in read_json(index)["weight_map"].items():
        if name not in entries or entries[name].file.name != file:
            raise ValueError(f"{index} says that tensor {name} is in {file}; it is not. The files do not belong together.")


def write(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES, stem: str = "model") -> list[Path]:
    """Writes safetensors: one file, or shards of at most `shard_bytes` (or one tensor) each and their index.

    The tensors are taken one by one and only one shard is held at a time. ValueError if the folder already has weights of that stem.
    """
    if old := sorted(p.name for p in directory.glob(f"{stem}*.safetensors*")):
        raise ValueError(f"{directory} already has weights ({', '.join(old[:4])}); they are not overwritten. Choose an empty folder.")
    directory.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[Path, dict[str, int]]] = []
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        part = directory / f".{stem}-{len(parts)}.part"
        parts.append((part, {name: array.nbytes for name, array in shard.items()}))  # first, so that a failed file is removed too
        _write_file(part, shard)
        shard.clear()

    try:
        for name, array in tensors:
            if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > shard_bytes:
                flush()
            shard[name] = array
        flush()
        return _publish(directory, stem, parts)
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)


def _publish(directory: Path, stem: str, parts: list[tuple[Path, dict[str, int]]]) -> list[Path]:
    """Gives the finished parts their names, and writes the index of several."""
    if len(parts) == 1:
        return [parts[0][0].replace(directory / f"{stem}.safetensors")]
    names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    files = [part.replace(directory / name) for name, (part, _) in zip(names, parts, strict=True)]
    weight_map = {tensor: name for name, (_, sizes) in zip(names, parts, strict=True) for tensor in sizes}
    total = sum(sum(sizes.values()) for _, sizes in parts)
    write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    # Wide types first, so that every tensor begins at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in ordered:
        if array.dtype not in CODES:
            raise ValueError(f"Tensor {name} has dtype {array.dtype}, which safetensors cannot hold.")
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
