"""Reads texts by SPEC: files, hub data sets, Python's own texts, sources of packages."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import package_folder
from lrcompress.runtime.safe_parsing import read_json

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
DEFAULT_FIELD = "text"


@dataclass(frozen=True)
class Corpus:
    """The documents of the text `spec`. Iterating may read from disk or network."""

    spec: str
    documents: Iterable[str]


def read_corpus(spec: str, use: Use) -> Corpus:
    """The documents that SPEC names, which is one of:

    - FILE.txt or FILE.jsonl[:field];
    - pydoc, the help topics of CPython. `use` decides the part; pydoc:calibration,
      pydoc:validation and pydoc:test name one;
    - package:NAME, the sources of an installed package, in the same parts (package:NAME:test);
    - name[:config[:split[:field]]], a hub data set.

    Raises InputError where the text cannot be read.
    """
    name, _, rest = spec.partition(":")
    if spec == SELF:
        raise InputError("data 'self' is for calibration only: name a text to measure on")
    if name == EMBEDDED:
        return Corpus(spec, _embedded(rest or use))
    if name == PACKAGE:
        package, _, part = rest.partition(":")
        return Corpus(spec, _package_sources(package, part or use))
    if name.endswith(".jsonl"):
        return Corpus(spec, _read_jsonl(Path(name), rest or DEFAULT_FIELD))
    if name.endswith(".txt") or Path(name).exists():
        return Corpus(spec, [_read_text(Path(name))])
    return Corpus(spec, _hub_documents(name, rest.split(":") if rest else [], use))


def _check_part(name: str, part: str) -> None:
    if part not in EMBEDDED_PARTS:
        choices = ", ".join(f"{name}:{choice}" for choice in EMBEDDED_PARTS)
        raise InputError(f"data '{name}:{part}' is unknown: use one of {choices}")


def _package_sources(package: str, part: str) -> Iterator[str]:
    """The Python files of one part of a package, without repeated paragraphs.

    The hash of a file's path decides its part. A paragraph stays only in the first file that has
    it, so that parts share no text.
    """
    _check_part(f"{PACKAGE}:{package}", part)
    root = _package_root(package)
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
    _check_part(EMBEDDED, part)
    from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

    documents = [topics[name] for name in sorted(topics)]
    total, end = sum(map(len, documents)), 0
    parts: dict[str, list[str]] = {name: [] for name in EMBEDDED_PARTS}
    first_part: dict[str, str] = {}  # by paragraph: some topics contain others, of other parts
    for document in documents:
        end += len(document)
        current = next(name for name, share in EMBEDDED_PARTS.items() if end <= share * total)
        paragraphs = [
            paragraph
            for paragraph in document.split("\n\n")
            if len(paragraph) < MIN_UNIQUE_PARAGRAPH
            or first_part.setdefault(paragraph, current) == current
        ]
        parts[current].append("\n\n".join(paragraphs))
    return parts[part]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"data file {str(path)!r} does not exist: give FILE.txt or FILE.jsonl")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"data file {str(path)!r} is not UTF-8 text: convert it, or name another")
    if not text.strip():
        raise InputError(f"data file {str(path)!r} is empty: name a file with text in it")
    return text


def _read_jsonl(path: Path, field: str) -> list[str]:
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    return [_field_of_line(path, number, line, field) for number, line in enumerate(lines, 1)]


def _field_of_line(path: Path, number: int, line: str, field: str) -> str:
    try:
        row = read_json(line)
    except ValueError as error:
        raise InputError(f"{str(path)!r} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        fields = ", ".join(row) if isinstance(row, dict) else "none"
        raise InputError(
            f"{str(path)!r} line {number} has no text field {field!r} (fields: {fields}): "
            "name one as FILE.jsonl:FIELD"
        )
    return row[field]  # type: ignore[no-any-return]


def _hub_documents(name: str, options: list[str], use: Use) -> Iterable[str]:
    """The documents of a hub data set; `options` are up to three of config, split and field."""
    path, config, test_split = NAMED_DATASETS.get(name, (name, None, "test"))
    padded: list[str | None] = [*options, None, None, None]
    config, field = padded[0] or config, padded[2] or DEFAULT_FIELD
    split = padded[1] or ("train" if use == "calibration" else test_split)
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split, streaming=True)
        texts = _field_of_rows(rows, name, field)
        if name == "wikitext2":  # its rows are the lines of one text
            return ["\n\n".join(texts)]
        return texts
    except (OSError, ValueError, RuntimeError) as error:
        raise _hub_error(name, error) from error


def _field_of_rows(rows: Any, name: str, field: str) -> Iterator[str]:
    try:
        for row in rows:
            if field not in row:
                raise InputError(
                    f"data set {name!r} has no field {field!r} (fields: {', '.join(row)}): name "
                    "one as name:config:split:field"
                )
            yield row[field]
    except (OSError, RuntimeError) as error:
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0][:200]
    return InputError(
        f"no file {name!r} exists and the hub gave no data set of that name ({reason}): give "
        "FILE.txt, FILE.jsonl[:field], pydoc, package:NAME, or name[:config[:split[:field]]]"
    )
