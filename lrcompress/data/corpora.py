"""Reads texts by SPEC: files, hub data sets, Python's own texts, sources of packages."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrcompress.data.conversations import ChatFormat
from lrcompress.data.files import DEFAULT_FIELD, TextFiles, find_files
from lrcompress.data.rows import documents
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import package_folder

Use = Literal["calibration", "test"]

# SPEC of the help topics that every Python installation has
EMBEDDED = "pydoc"
# SPEC prefix of the sources of an installed package, and the name of the standard library there
PACKAGE = "package"
STANDARD_LIBRARY = "python"
# SPEC of text that the model itself writes, for calibration only
SELF = "self"
# part -> where it ends, as a share of the characters of the embedded text
EMBEDDED_PARTS = {"calibration": 0.65, "validation": 0.75, "test": 1.0}
# part -> where it ends, as a share of the files of a package
SOURCE_PARTS = {"calibration": 0.9, "validation": 0.95, "test": 1.0}
# paragraphs with at least this many characters may not be in two parts
MIN_UNIQUE_PARAGRAPH = 80
# SPEC name -> hub path, config, test split
NAMED_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}


@dataclass(frozen=True)
class Corpus:
    """The documents of the text `spec`. Iterating may read from disk or network."""

    spec: str
    documents: Iterable[str]


@dataclass(frozen=True)
class Documents(Iterable[str]):
    """Documents that `read` reads again each time."""

    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())


def read_corpus(spec: str, use: Use, chat: ChatFormat | None = None) -> Corpus:
    """The documents that SPEC names, which is one of:

    - FILE[:field], a file, folder or glob (see `files.READERS`);
    - pydoc, the help topics of CPython. `use` decides the part; pydoc:calibration,
      pydoc:validation and pydoc:test name one;
    - package:NAME, the sources of an installed package, in the same parts (package:NAME:test);
    - name[:config[:split[:field]]], a hub data set.

    `chat` turns conversations into text; without it they are refused. Raises InputError where the
    text does not exist, and when the documents are iterated where one cannot be read.
    """
    if spec == SELF:
        raise InputError("data 'self' is for calibration only: name a text to measure on")
    return Corpus(spec, Documents(_reader(spec, use, chat)))


def _reader(spec: str, use: Use, chat: ChatFormat | None) -> Callable[[], Iterable[str]]:
    """The function that reads the documents of SPEC. Raises InputError where there are none."""
    name, _, rest = spec.partition(":")
    if name == EMBEDDED:
        _check_part(EMBEDDED, rest or use)
        return lambda: _embedded(rest or use)
    if name == PACKAGE:
        package, _, part = rest.partition(":")
        _check_part(f"{PACKAGE}:{package}", part or use)
        root = _package_root(package)
        return lambda: _package_sources(root, part or use)
    if files := find_files(spec):
        return lambda: _file_documents(files, use, chat)
    rows, field = _hub_rows(name, rest.split(":"), use)
    return lambda: _hub_documents(name, rows, field, chat)


def _file_documents(files: TextFiles, use: Use, chat: ChatFormat | None) -> Iterator[str]:
    rows = files.rows("train" if use == "calibration" else "test")
    numbered = ((f"{file!r} {place}", row) for file, (place, row) in rows)
    return documents(files.spec, numbered, files.field, chat)


def _check_part(name: str, part: str) -> None:
    if part not in EMBEDDED_PARTS:
        choices = ", ".join(f"{name}:{choice}" for choice in EMBEDDED_PARTS)
        raise InputError(f"data '{name}:{part}' is unknown: use one of {choices}")


def _package_sources(root: Path, part: str) -> Iterator[str]:
    """The Python files of one part of the package in `root`, without repeated paragraphs.

    The hash of a file's path decides its part. A paragraph stays only in the first file that has
    it, so that parts share no text.
    """
    seen: set[int] = set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if "site-packages" in path or not (text := _read_utf8(file)):
            continue
        paragraphs = [
            paragraph
            for paragraph in text.split("\n\n")
            if len(paragraph) < MIN_UNIQUE_PARAGRAPH or _add_if_new(seen, hash(paragraph))
        ]
        if _part_of(path) == part:
            yield "\n\n".join(paragraphs)


def _add_if_new(values: set[int], value: int) -> bool:
    """Adds `value`; returns whether it was new."""
    size = len(values)
    values.add(value)
    return len(values) > size


def _part_of(path: str) -> str:
    """The part of a package's file, by a hash of its path that is uniform in [0, 1)."""
    position = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) / 2**32
    return next(name for name, share in SOURCE_PARTS.items() if position < share)


def _read_utf8(file: Path) -> str:
    """The text of a file; empty where it is not UTF-8."""
    try:
        return file.read_text("utf-8").strip()
    except UnicodeDecodeError:
        return ""


def _package_root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    folder = package_folder(package)
    if folder is None:
        raise InputError(
            f"data 'package:{package}': no package {package!r} is installed here: install it, or "
            "use package:python, the standard library"
        )
    return folder


def _embedded(part: str) -> list[str]:
    """The topics of one part. A repeated paragraph stays only in the first part that has it."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

    texts = [topics[name] for name in sorted(topics)]
    total, end = sum(map(len, texts)), 0
    parts: dict[str, list[str]] = {name: [] for name in EMBEDDED_PARTS}
    first_part: dict[str, str] = {}  # by paragraph: some topics contain others, of other parts
    for text in texts:
        end += len(text)
        current = next(name for name, share in EMBEDDED_PARTS.items() if end <= share * total)
        paragraphs = [
            paragraph
            for paragraph in text.split("\n\n")
            if len(paragraph) < MIN_UNIQUE_PARAGRAPH
            or first_part.setdefault(paragraph, current) == current
        ]
        parts[current].append("\n\n".join(paragraphs))
    return parts[part]


def _hub_rows(name: str, options: list[str], use: Use) -> tuple[Iterable[Any], str | None]:
    """The rows of a hub data set, and the field; `options` are config, split and field, if any."""
    path, config, test_split = NAMED_DATASETS.get(name, (name, None, "test"))
    default_split = "train" if use == "calibration" else test_split
    chosen = [*options, "", "", ""]
    from datasets import load_dataset

    try:
        rows = load_dataset(
            path, chosen[0] or config, split=chosen[1] or default_split, streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(name, error) from error
    return rows, chosen[2] or None


def _hub_documents(
    name: str, rows: Iterable[Any], field: str | None, chat: ChatFormat | None
) -> Iterator[str]:
    try:
        if name == "wikitext2":  # its rows are the lines of one text, with empty ones
            yield "\n\n".join(row[field or DEFAULT_FIELD] for row in rows)
            return
        numbered = ((f"data set {name!r} row {n}", row) for n, row in enumerate(rows, 1))
        yield from documents(name, numbered, field, chat)
    except (OSError, RuntimeError) as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0][:200]
    return InputError(
        f"no file {name!r} exists and the hub gave no data set of that name ({reason}): give "
        "FILE[:field], pydoc, package:NAME, or name[:config[:split[:field]]]"
    )
