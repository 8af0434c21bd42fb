"""Rows of files: one text in every form is the same text, and places are those of the file."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from lrcompress.data.corpora import read_corpus
from lrcompress.data.files import find_files
from lrcompress.data.windows import Windowing
from lrcompress.evaluation.perplexity import perplexity
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, tiny_model

# separators of Unicode that are no line ends, and texts that readers take for other types
TEXT = 'The "first" line, naïve 日本\u2028語;\twith a tab\n\nand a last one\n' * 3
ROWS = [{"text": TEXT}, {"text": "2020-01-01"}, {"text": "007"}, {"text": "NA"}]
Write = Callable[[Path, list[dict[str, str]]], None]


def lines_of(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text(lines_of(rows), "utf-8", newline="")


def json_array(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text(json.dumps(rows, indent=1), "utf-8")


def texts_of_array(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text(json.dumps([row["text"] for row in rows]), "utf-8")


def separated(delimiter: str, **options: str) -> Write:
    def write(file: Path, rows: list[dict[str, str]]) -> None:
        with file.open("w", newline="", **options) as stream:  # type: ignore[call-overload]
            writer = csv.writer(stream, delimiter=delimiter)
            writer.writerows([["text"], *([row["text"]] for row in rows)])

    return write


def with_bom_and_crlf(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text(lines_of(rows).replace("\n", "\r\n"), "utf-8-sig", newline="")


def parquet(file: Path, rows: list[dict[str, str]]) -> None:
    Dataset.from_list(rows).to_parquet(str(file))


def arrow(file: Path, rows: list[dict[str, str]]) -> None:
    folder = file.with_suffix("")
    Dataset.from_list(rows).save_to_disk(str(folder))
    (part,) = folder.glob("*.arrow")
    part.rename(file)
    shutil.rmtree(folder)


def saved(folder: Path, rows: list[dict[str, str]]) -> None:
    Dataset.from_list(rows).save_to_disk(str(folder))


def saved_splits(folder: Path, rows: list[dict[str, str]]) -> None:
    other = Dataset.from_list([{"text": "other"}])
    DatasetDict({"train": other, "test": Dataset.from_list(rows)}).save_to_disk(str(folder))


def folder_of_files(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden.bin").write_bytes(b"\0")
    json_lines(folder / "a.jsonl", rows[:1])
    json_lines(folder / "deep" / "b.ndjson", rows[1:])


def compressed(write: Write, compression: str) -> Write:
    def write_compressed(file: Path, rows: list[dict[str, str]]) -> None:
        plain = file.with_suffix("")
        write(plain, rows)
        with pyarrow.output_stream(str(file), compression=compression) as stream:
            stream.write(plain.read_bytes())
        plain.unlink()

    return write_compressed


FORMS: dict[str, Write] = {
    "lines.jsonl": json_lines,
    "upper.JSONL": json_lines,
    "lines.ndjson": json_lines,
    "lines.json": json_lines,
    "array.json": json_array,
    "texts.json": texts_of_array,
    "windows.jsonl": with_bom_and_crlf,
    "windows.json": with_bom_and_crlf,
    "table.csv": separated(","),
    "bom.csv": separated(",", encoding="utf-8-sig"),
    "table.tsv": separated("\t"),
    "columns.parquet": parquet,
    "columns[1].arrow": arrow,
    "saved": saved,
    "saved-splits": saved_splits,
    "folder": folder_of_files,
    "a.jsonl.gz": compressed(json_lines, "gzip"),
    "a.json.zst": compressed(json_array, "zstd"),
    "a.csv.gz": compressed(separated(","), "gzip"),
    "a.parquet.zst": compressed(parquet, "zstd"),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_in_every_form_are_the_same_documents(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name, ROWS)
    expected = [row["text"] for row in ROWS]
    corpus = read_corpus(str(tmp_path / name), "test")
    assert list(corpus.documents) == expected
    assert list(corpus.documents) == expected  # and once more
    assert list(read_corpus(f"{tmp_path / name}:text", "test").documents) == expected


def test_one_text_in_every_form_gives_one_perplexity(tmp_path: Path) -> None:
    """Whatever the form: rows or prose, compressed or not, with BOM and line ends of Windows."""
    prose = {"a.txt": ("utf-8", "\n"), "bom.md": ("utf-8-sig", "\n"), "crlf.txt": ("utf-8", "\r\n")}
    for name, (encoding, newline) in prose.items():
        (tmp_path / name).write_text(TEXT, encoding, newline=newline)
    (tmp_path / "a.txt.gz").write_bytes(
        gzip.compress(TEXT[:50].encode()) + gzip.compress(TEXT[50:].encode())
    )
    windows = TEXT.replace("\n", "\r\n")
    separated(",")(tmp_path / "windows.csv", [{"text": windows}])
    json_lines(tmp_path / "windows.jsonl", [{"text": windows}])
    for name, write in FORMS.items():
        write(tmp_path / f"one-{name}", ROWS[:1])
    loaded = (tiny_model(), byte_tokenizer())
    values = {
        file.name: perplexity("m", loaded, read_corpus(str(file), "test"), Windowing(32)).value
        for file in sorted(tmp_path.iterdir())
    }
    assert len(values) > len(FORMS)
    assert set(values.values()) == {values["a.txt"]}


def test_globs_and_paths_with_special_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a:b.txt", "über c.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TEXTS", str(tmp_path))
    for spec in ("~/a:b.txt", "$TEXTS/a:b.txt", "${TEXTS}/a:b.txt:text"):
        assert list(read_corpus(spec, "test").documents) == ["a:b.txt"]
    assert list(read_corpus("~/*.txt", "test").documents) == ["a:b.txt", "über c.txt"]


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    saved_splits(tmp_path / "s", ROWS)
    assert list(read_corpus(str(tmp_path / "s"), "calibration").documents) == ["other"]
    assert len(list(read_corpus(str(tmp_path / "s/test"), "calibration").documents)) == 4
    DatasetDict({"dev": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "one"))
    assert len(list(read_corpus(str(tmp_path / "one"), "test").documents)) == 4
    DatasetDict({k: Dataset.from_list(ROWS) for k in "ab"}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(InputError, match=r"has no split 'test': name one of .*two/a, .*two/b"):
        list(read_corpus(str(tmp_path / "two"), "test").documents)


REFUSED = {
    "notes.pdf": (b"words", "suffix of .*notes.pdf' does not tell what it holds"),
    "notes": (b"words", "suffix of .*notes' does not tell what it holds"),
    "script.py": (b"words", "does not tell what it holds"),
    "utf16.txt": ("words".encode("utf-16"), "is not UTF-8 text: convert it"),
    "latin.csv": ("text\ncafé\n".encode("latin-1"), "is not UTF-8 text: convert it"),
    "a.parquet": (b"words", "a.parquet' cannot be read"),
    "a.jsonl.gz": (b"words", "a.jsonl.gz' cannot be read"),
    "cut.jsonl": (
        b'{"text": "a"}\n\n{"text": "cut',
        "line 3 is not JSON: Unterminated string starting at at column 10$",
    ),
    "cut.json": (b'[{"text": "a"},', "cut.json' is not JSON"),
    "number.jsonl": (b'{"text": "a"}\n\n{"text": 5}', "line 3: field 'text' is of type number"),
    "field.jsonl": (b'\n\n{"txt": "a"}', r"line 3 has no field 'text' \(fields: txt\)"),
    "list.jsonl": (b"[1]", "line 1 is of type list: it has to be an object"),
    "field.csv": (b'a,b\n"x\ny",2\n', r"line 2 has no field 'text' \(fields: a, b\)"),
    "item.json": (b'[{"text": "a"}, {"text": {}}]', "item 2: field 'text' is of type object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    content, sentence = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        list(read_corpus(str(tmp_path / name), "test").documents)


def test_folders_of_nothing_and_of_several_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no files"):
        find_files(str(tmp_path))
    (tmp_path / "card.md").write_text("about the data")
    json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(InputError, match=r"several kinds \(json, text\).*'\*.jsonl'"):
        find_files(str(tmp_path))
    with pytest.raises(InputError, match=r"'.*none/\*.txt' does not exist"):
        find_files(str(tmp_path / "none" / "*.txt"))
    assert find_files("some/data:config:split") is None
