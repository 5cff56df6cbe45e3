"""Where rows come from: files, folders and hub data sets, found, checked and then parsed by the `datasets` library.

A file is checked whole before it is parsed (empty, cut short, not UTF-8, a malformed line), so that an error names the file and the line
instead of surfacing half an hour later.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

PARSERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
SAMPLES = ("line", "paragraph", "document")
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Place:
    """What a path turned out to be.

    kind    the suffix that the files share (".jsonl"), "saved" (a folder written by `save_to_disk`) or "hub"
    splits  {split: files in reading order}; for "saved" the folder; empty for "hub"
    """

    kind: str
    splits: dict[str, list[Path]]

    def files(self, split: str) -> list[Path]:
        """The files that a split such as `train[:95%]+test` is read from."""
        if self.kind == "saved":
            return sorted(self.splits["all"][0].rglob("*.arrow"))
        named = set(re.findall(r"[A-Za-z_][\w.-]*(?=\[|\+|$)", split))
        if unknown := named - set(self.splits):
            raise ValueError(f"split={split!r} names {sorted(unknown)}; there is {', '.join(self.splits)}.")
        return [file for name, files in self.splits.items() if name in named for file in files]


def read(
    path: str | Sequence[str], *, subset: str | None = None, split: str = "train", columns: tuple[str, ...] = (), sample_by: str = "line"
) -> datasets.Dataset:
    """The rows of a split, addressed by index.

    path       a jsonl, json, csv, tsv, parquet or txt file (also .gz), a glob, a list of files, a folder of such files (their names tell
               the split: train, validation, test), a folder written by `save_to_disk`, or a hub id
    subset     the configuration of a hub data set
    split      as `datasets` slices it: "train", "train[:95%]", "train[:100]+test"; loose files are the split "train"
    columns    the names of the columns of csv or tsv files that have no header line
    sample_by  what a row of a txt file is: "line", "paragraph" (blank lines between them) or "document"; blank ones are no rows

    Cells of csv and tsv are text, an empty one is null; quotes mean nothing in tsv. ValueError for everything that is wrong with the data.
    """
    place = find(path)
    _check_options(path, place, subset, columns, sample_by)
    if place.kind == "hub":
        data = _load(path, split, str(path), name=subset)
    elif place.kind == "saved":
        data = _saved(place.splits["all"][0], split)
    else:
        files = place.files(split)
        header = check(files, place.kind, columns)
        names = {name: [str(file) for file in group] for name, group in place.splits.items() if group[0] in files}
        data = _load(path, split, PARSERS[place.kind], data_files=names, **_options(place.kind, header, columns, sample_by))
        if place.kind == ".txt":
            full = [i for i, text in enumerate(data["text"]) if text.strip()]
            data = data if len(full) == len(data) else data.select(full)
    if not len(data):
        raise ValueError(f"{path}, split {split!r}, holds no rows.")
    return data


def digest(path: str | Sequence[str], data: datasets.Dataset, *, split: str = "train") -> str:
    """What the rows were read from: the sha256 of the one file, or of the files' sha256 in reading order; `datasets`' mark of a hub set.

    Names of files do not count, nor which slice of a split is taken.
    """
    place = find(path)
    if place.kind == "hub":
        return data._fingerprint
    hashes = []
    for file in place.files(split):
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def find(path: str | Sequence[str]) -> Place:
    """What is at a path. ValueError that names the path and its nearest existing parent, if nothing is."""
    if not path:
        raise ValueError("path is empty: give a file, a glob, a folder or a hub id.")
    if isinstance(path, str):
        here = Path(path).expanduser()
        if here.is_dir():
            return _folder(here)
        if not here.exists() and not glob.has_magic(path) and _kind(here) not in PARSERS and HUB_ID.fullmatch(path):
            return Place("hub", {})
    files = [file for one in ([path] if isinstance(path, str) else path) for file in _matches(one)]
    return Place(_common_kind(files), {"train": files})


def _matches(path: str) -> list[Path]:
    here = Path(path).expanduser()
    if here.is_file():
        return [here]
    if glob.has_magic(path):
        if found := [Path(file) for file in sorted(glob.glob(str(here), recursive=True)) if Path(file).is_file()]:
            return found
        raise ValueError(f"No file matches {path!r}.")
    if here.is_dir():
        raise ValueError(f"{path} is a folder; a list names files. Give the folder alone, or a glob such as {path}/*.jsonl.")
    parent = next(p for p in here.absolute().parents if p.is_dir())
    raise ValueError(f"There is no {path}. The nearest folder that exists is {parent}, with: {_some(parent.iterdir())}.")


def _folder(folder: Path) -> Place:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Place("saved", {"all": [folder]})
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kind(file) in PARSERS)
    if not files:
        raise ValueError(f"{folder} has no data files ({', '.join(PARSERS)}); it has: {_some(folder.iterdir())}.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", file.name.lower()) if word in SPLIT_WORDS]
        splits.setdefault(words[0] if words else "", []).append(file)
    loose = splits.pop("", [])
    if loose and splits:
        raise ValueError(
            f"{folder} has files of a split and also {_some(loose)}, whose names say no split. Name the files to read instead."
        )
    return Place(_common_kind(files), splits or {"train": loose})


def _common_kind(files: list[Path]) -> str:
    kinds = {_kind(file): file for file in files}
    for kind, file in kinds.items():
        if kind not in PARSERS:
            raise ValueError(f"{file} has no known suffix; files end in {', '.join(PARSERS)} (or with .gz after it).")
    if len(kinds) > 1:
        raise ValueError(f"Files of several kinds cannot be read as one data set: {_some(kinds.values())}. Name those of one kind.")
    return next(iter(kinds))


def _kind(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _some(files: Any) -> str:
    names = sorted(file.name for file in files)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _check_options(path: Any, place: Place, subset: str | None, columns: tuple[str, ...], sample_by: str) -> None:
    if subset is not None and place.kind != "hub":
        raise ValueError(f"subset={subset!r} names a configuration of a hub data set, but {path} is on disk. Leave it out.")
    if columns and place.kind not in (".csv", ".tsv"):
        raise ValueError(
            f"columns={tuple(columns)} names the columns of csv or tsv files without a header; {path} is not one. Leave it out."
        )
    if sample_by not in SAMPLES:
        raise ValueError(f"sample_by={sample_by!r} is not one of {', '.join(SAMPLES)}.")


# Parsing, by `datasets`.


def _options(kind: str, header: list[str], columns: tuple[str, ...], sample_by: str) -> dict[str, Any]:
    import datasets

    if kind == ".txt":
        return {"sample_by": sample_by}
    if kind not in (".csv", ".tsv"):
        return {}
    # Types are not guessed and "NA" is a word: 007 stays 007, and only an empty cell is null.
    text = datasets.Features({name: datasets.Value("string") for name in header})
    names = {"column_names": header} if columns else {}
    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    return {"features": text, "keep_default_na": False, "na_values": [""], **names, **dialect}


def _load(path: Any, split: str, builder: str, **options: Any) -> datasets.Dataset:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a log file each would be a line of its own
    try:
        data = datasets.load_dataset(builder, split=split, **options)
    except Exception as error:  # whatever the parser or the network raises
        where = f"{path} is not on this disk, and as a hub data set it" if builder == path else f"{path}, split {split!r},"
        raise ValueError(f"{where} could not be read: {error.__cause__ or error}") from error
    assert isinstance(data, datasets.Dataset)
    return data


def _saved(folder: Path, split: str) -> datasets.Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        cuts = datasets.ReadInstruction.from_spec(split).to_absolute({str(name): len(part) for name, part in parts.items()})
        pieces = [
            parts[cut.splitname].select(range(cut.from_ or 0, len(parts[cut.splitname]) if cut.to is None else cut.to)) for cut in cuts
        ]
        return datasets.concatenate_datasets(pieces)
    except Exception as error:
        raise ValueError(f"{folder}, split {split!r}, could not be read: {error}") from error


# Checks, before anything is parsed.


def check(files: list[Path], kind: str, columns: tuple[str, ...] = ()) -> list[str]:
    """The names of the columns of csv and tsv files, [] for other kinds. ValueError, with file and line, for a file that is broken."""
    header = list(columns)
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty.")
        if kind == ".parquet":
            continue
        try:
            lines = sum(1 for _ in _lines(file))
            if not lines:
                raise ValueError(f"{file} is empty.")
            if kind in (".csv", ".tsv"):
                header = _check_table(file, kind, header, titled=not columns)
            elif kind != ".txt":
                _check_json(file, kind)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error
    return header


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")  # pyright: ignore[reportReturnType]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line). ValueError for bytes that are not UTF-8."""
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, line {number}: not UTF-8 ({error.reason}, byte {error.start}). Convert the file to UTF-8."
                ) from None


def _check_json(file: Path, kind: str) -> None:
    """Every line is an object; a .json file may also be one value over many lines."""
    if kind == ".json":
        with _open(file) as stream:
            try:
                json.loads(stream.read())
                return
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":  # what stands after a first whole value: further lines
                    raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}).") from None
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg}, column {error.colno}): {_start(line)}") from None
        if not isinstance(value, dict):
            raise ValueError(f'{file}, line {number}: not an object {{"column": value}}: {_start(line)}')


def _check_table(file: Path, kind: str, header: list[str], titled: bool) -> list[str]:
    """The header. Every line has as many fields as it has names."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a field of more than 128 KiB
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == ".tsv" else csv.reader(text)
        for row in rows:
            if titled:
                titled = False
                if header and row != header:
                    raise ValueError(f"{file} has the columns {row}, the files before it {header}.")
                header = row
                if len(set(row)) < len(row):
                    raise ValueError(f"{file}: the header {row} names a column twice. Without a header line, set columns.")
            elif row and len(row) != len(header):
                raise ValueError(f"{file}, line {rows.line_num}: {len(row)} fields, but {len(header)} columns {header}: {_start(str(row))}")
    return header


def _start(line: str) -> str:
    return repr(line[:60].rstrip()) + (" ..." if len(line) > 60 else "")
