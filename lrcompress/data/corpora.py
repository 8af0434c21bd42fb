"""Texts by SPEC: files, hub data sets, and the text that every Python ships."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import read_json

Use = Literal["calibration", "test"]

EMBEDDED = "pydoc"
# sources of installed packages
PACKAGE = "package"
STANDARD_LIBRARY = "python"
# text that the model writes: for calibration alone
SELF = "self"
# where the parts of the embedded text end, as shares of its characters
EMBEDDED_PARTS = {"calibration": 0.65, "validation": 0.75, "test": 1.0}
# the same of the files of a package
SOURCE_PARTS = {"calibration": 0.9, "validation": 0.95, "test": 1.0}
# characters of a paragraph that no two parts of the embedded text may share
REPEATED = 80
# name -> hub path, config, test split
NAMED_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
DEFAULT_FIELD = "text"


@dataclass(frozen=True)
class Corpus:
    """Documents and where they came from. Iterating may read from disk or network."""

    spec: str
    documents: Iterable[str]


def read_corpus(spec: str, use: Use) -> Corpus:
    """The documents that SPEC names.

    SPEC is FILE.txt, FILE.jsonl[:field], `pydoc` (the calibration or the test part of CPython's
    texts, by `use`; pydoc:calibration, pydoc:validation and pydoc:test name one), package:NAME (the
    sources of an installed package, in the same parts: package:NAME:test), or a hub data set
    name[:config[:split[:field]]]. Raises InputError where it cannot be read.
    """
    name, _, rest = spec.partition(":")
    if spec == SELF:
        raise InputError("data 'self' is for calibration alone: name a text to measure on")
    if name == EMBEDDED:
        return Corpus(spec, _embedded(rest or use))
    if name == PACKAGE:
        package, _, part = rest.partition(":")
        return Corpus(spec, _sources(package, part or use))
    if name.endswith(".jsonl"):
        return Corpus(spec, _read_jsonl(Path(name), rest or DEFAULT_FIELD))
    if name.endswith(".txt") or Path(name).exists():
        return Corpus(spec, [_read_text(Path(name))])
    return Corpus(spec, _hub_documents(name, rest.split(":") if rest else [], use))


def _check_part(name: str, part: str) -> None:
    if part not in EMBEDDED_PARTS:
        known = ", ".join(f"{name}:{one}" for one in EMBEDDED_PARTS)
        raise InputError(f"data '{name}:{part}' is unknown: use one of {known}")


def _sources(package: str, part: str) -> Iterator[str]:
    """The Python files of a package, without paragraphs that stood in one before.

    A file's part is decided by the hash of its path, and a repeated paragraph goes to the file that
    comes first, so that no two parts share one.
    """
    _check_part(f"{PACKAGE}:{package}", part)
    root = _package_folder(package)
    known: set[int] = set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if "site-packages" in path or not (text := _decoded(file)):
            continue
        kept = [p for p in text.split("\n\n") if len(p) < REPEATED or _is_new(known, hash(p))]
        if _part_of(path) == part:
            yield "\n\n".join(kept)


def _is_new(known: set[int], mark: int) -> bool:
    size = len(known)
    known.add(mark)
    return len(known) > size


def _part_of(path: str) -> str:
    place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) / 2**32
    return next(name for name, share in SOURCE_PARTS.items() if place < share)


def _decoded(file: Path) -> str:
    """Empty where it is no UTF-8."""
    try:
        return file.read_text("utf-8").strip()
    except UnicodeDecodeError:
        return ""


def _package_folder(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"data 'package:{package}': no package {package!r} is installed here: install it, or "
            "use package:python, the standard library"
        )
    return Path(spec.submodule_search_locations[0])


def _embedded(part: str) -> list[str]:
    _check_part(EMBEDDED, part)
    from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

    documents = [topics[name] for name in sorted(topics)]
    total, end = sum(map(len, documents)), 0
    parts: dict[str, list[str]] = {name: [] for name in EMBEDDED_PARTS}
    homes: dict[str, str] = {}  # paragraph -> the first part that holds it
    for document in documents:
        end += len(document)
        inside = next(name for name, share in EMBEDDED_PARTS.items() if end <= share * total)
        kept = [p for p in document.split("\n\n") if len(p) < REPEATED or _home(homes, p, inside)]
        parts[inside].append("\n\n".join(kept))
    return parts[part]


def _home(homes: dict[str, str], paragraph: str, part: str) -> bool:
    """Whether `paragraph` is of `part`: some topics hold others whole, in other parts."""
    return homes.setdefault(paragraph, part) == part


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
    return [_field_of(path, number, line, field) for number, line in enumerate(lines, 1)]


def _field_of(path: Path, number: int, line: str, field: str) -> str:
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


def _hub_documents(name: str, parts: list[str], use: Use) -> Iterable[str]:
    path, config, test = NAMED_DATASETS.get(name, (name, None, "test"))
    given: list[str | None] = [*parts, None, None, None]
    config, field = given[0] or config, given[2] or DEFAULT_FIELD
    split = given[1] or ("train" if use == "calibration" else test)
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split, streaming=True)
        texts = _texts(rows, name, field)
        if name == "wikitext2":  # its rows are lines of one text
            return ["\n\n".join(texts)]
        return texts
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, error) from error


def _texts(rows: Any, name: str, field: str) -> Iterator[str]:
    try:
        for row in rows:
            if field not in row:
                raise InputError(
                    f"data set {name!r} has no field {field!r} (fields: {', '.join(row)}): name "
                    "one as name:config:split:field"
                )
            yield row[field]
    except (OSError, RuntimeError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0][:200]
    return InputError(
        f"no file {name!r} exists and the hub gave no data set of that name ({reason}): give "
        "FILE.txt, FILE.jsonl[:field], pydoc, package:NAME, or name[:config[:split[:field]]]"
    )
