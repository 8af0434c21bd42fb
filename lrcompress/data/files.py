"""Finds the files that a SPEC names, and reads their rows with the place of each in its file.

The formats without column types (JSON, CSV) are read by Python's own parsers: the readers of
`datasets` guess types, by which a text such as 2020-01-01 or 007 would become a date or a number,
and they do not know line numbers. Files with column types go through `datasets`.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape, glob
from json import JSONDecodeError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow

from lrcompress.runtime.errors import InputError, machine_fault_reason
from lrcompress.runtime.paths import user_path
from lrcompress.runtime.safe_parsing import read_json

# the place of a row in its file, such as "line 3", and its value
Row = tuple[str, Any]
DEFAULT_FIELD = "text"
# last suffix -> the name that Arrow has for the compression
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# files in folders that `save_to_disk` of `datasets` wrote: of one data set, and of several splits
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class TextFiles:
    """The `files` that a SPEC names, sorted, and the field that it names, if any.

    A folder of `save_to_disk` stands among the files as one.
    """

    spec: str
    files: tuple[Path, ...]
    field: str | None

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        """The path and the row of every row; `split` is taken from a folder of several splits.

        Raises InputError where a file cannot be read.
        """
        for file in self.files:
            for row in _rows(file, split):
                yield str(file), row

    def contents(self) -> Iterator[Path]:
        """All single files, also those inside folders."""
        for file in self.files:
            yield from file.rglob("*") if file.is_dir() else [file]


def find_files(spec: str) -> TextFiles | None:
    """The files of SPEC, which is PATH or PATH:FIELD; PATH is a file, a folder or a glob.

    None where SPEC names no local file and does not look as if it should. Raises InputError where
    it does, and where a file has a suffix that no reader is for.
    """
    if files := existing_files(spec):
        _check_kinds(files)
        return files
    for text in (spec, spec.rpartition(":")[0]):
        if _looks_local(text):
            raise InputError(
                f"data file {text!r} does not exist: give a file ({', '.join(READERS)}, or one of "
                f"these with {' or '.join(COMPRESSIONS)}), a folder or a glob"
            )
    return None


def existing_files(spec: str) -> TextFiles | None:
    """The files of SPEC, of any kind; None where it names no local file or folder."""
    path, _, field = spec.rpartition(":")
    for text, name in ((spec, None), (path, field)):
        files = _matching(user_path(text)) if text else None
        if files is not None:
            return TextFiles(spec, files, name or None)
    return None


def _matching(path: Path) -> tuple[Path, ...] | None:
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        return (path,)
    # pathlib refuses patterns such as a**.txt
    matches = sorted(glob(str(path), recursive=True))  # noqa: PTH207
    return tuple(file for file in map(Path, matches) if file.is_file()) or None


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    """The files below `folder`, without hidden ones; or `folder` itself if `datasets` saved it."""
    if any((folder / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)):
        return (folder,)
    return tuple(
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def suffix(file: Path) -> str:
    """The suffix in lower case, without that of a compression: .jsonl for a.jsonl.gz."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _check_kinds(files: TextFiles) -> None:
    """Raises InputError for no file, for a file of an unknown kind, and for several kinds."""
    plain = [file for file in files.files if not file.is_dir()]
    if not files.files:
        raise InputError(f"data folder {files.spec!r} holds no files: name one with text in it")
    for file in plain:
        if suffix(file) not in READERS:
            raise InputError(
                f"data {files.spec!r}: the suffix of {str(file)!r} does not tell what it holds: "
                f"rename it ({', '.join(READERS)}), or name other files, such as by '*.txt'"
            )
    kinds = sorted({KINDS[suffix(file)] for file in plain})
    if len(kinds) > 1:
        raise InputError(
            f"data {files.spec!r} holds files of several kinds ({', '.join(kinds)}): name those "
            "of one kind, such as by '*.jsonl'"
        )


def _looks_local(text: str) -> bool:
    is_path = text.startswith(("/", ".", "~", "$")) or any(sign in text for sign in "*?[")
    return is_path or suffix(Path(text)) in READERS


def _rows(file: Path, split: str) -> Iterator[Row]:
    """The rows of one file. Raises InputError where it cannot be read to its end."""
    try:
        yield from _saved_rows(file, split) if file.is_dir() else READERS[suffix(file)](file)
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except InputError:
        raise
    except (OSError, EOFError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        if machine_fault_reason(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"data file {str(file)!r} cannot be read: {reason}") from error


def _not_utf8(file: Path) -> InputError:
    return InputError(f"data file {str(file)!r} is not UTF-8 text: convert it, or name another")


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, decompressed and without a byte order mark."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    with pyarrow.input_stream(str(file), compression=compression) as stream:
        yield io.TextIOWrapper(stream, "utf-8-sig", newline=newline)


def _prose(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        text = stream.read()
    if "\0" in text:
        raise _not_utf8(file)
    yield "its text", {DEFAULT_FIELD: text}


def _json_lines(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        yield from _parsed_lines(file, stream)


def _parsed_lines(file: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = read_json(line.rstrip("\n"))
            except JSONDecodeError as error:  # its own text counts lines from this one
                reason = f"{error.msg} at column {error.colno}"
                raise InputError(f"{str(file)!r} line {number} is not JSON: {reason}") from None
            except ValueError as error:
                raise InputError(f"{str(file)!r} line {number} is not JSON: {error}") from None
            yield f"line {number}", value


def _json(file: Path) -> Iterator[Row]:
    """The items of an array, or the lines, or the one object of a file."""
    with _opened(file) as stream:
        text = stream.read()
    if not text.lstrip().startswith("[") and not _is_one_value(text):
        yield from _parsed_lines(file, text.split("\n"))
        return
    try:
        value = read_json(text)
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not JSON: {error}") from None
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"item {number}", item


def _is_one_value(text: str) -> bool:
    """Whether the first line alone is not JSON, so that the value goes on after it."""
    try:
        read_json(text.lstrip().partition("\n")[0])
    except ValueError:
        return text.lstrip().startswith("{") and text.rstrip().endswith("}") and "\n" in text
    return False


def _csv(file: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents of 128 KiB
    with _opened(file, newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, restkey="")
        begin = 2
        for row in reader:
            yield f"line {begin}", row
            begin = reader.line_num + 1


def _tsv(file: Path) -> Iterator[Row]:
    return _csv(file, "\t")


def _columns(file: Path) -> Iterator[Row]:
    """The rows of a .parquet or .arrow file, by the reader of `datasets`."""
    from datasets import load_dataset

    with _decompressed(file) as plain:
        kind = KINDS[suffix(file)]
        rows = load_dataset(kind, data_files=escape(str(plain)), split="train", streaming=True)
        yield from _numbered(rows)


@contextmanager
def _decompressed(file: Path) -> Iterator[Path]:
    """`file` itself, or a temporary copy that is not compressed."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        yield file.absolute()
        return
    with TemporaryDirectory() as folder:
        plain = Path(folder) / f"data{suffix(file)}"
        with (
            pyarrow.input_stream(str(file), compression=compression) as stream,
            plain.open("wb") as copy,
        ):
            shutil.copyfileobj(stream, copy)
        yield plain


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        split = next(iter(dataset)) if len(dataset) == 1 else split
        if split not in dataset:
            raise InputError(
                f"data folder {str(folder)!r} has no split {split!r}: name one of "
                + ", ".join(str(folder / name) for name in dataset)
            )
        dataset = dataset[split]
    yield from _numbered(dataset)


def _numbered(rows: Iterable[Any]) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


# suffix -> reader, and the kind of files that it is for
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _prose, ".md": _prose, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json,
    ".csv": _csv, ".tsv": _tsv, ".parquet": _columns, ".arrow": _columns,
}  # fmt: skip
KINDS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
