"""Texts by SPEC: parts that share nothing, fields of JSONL, and errors that name the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.data.corpora import read_corpus
from lrcompress.runtime.errors import InputError


def test_embedded_parts_do_not_overlap() -> None:
    calibration = list(read_corpus("pydoc", "calibration").documents)
    test = list(read_corpus("pydoc", "test").documents)
    assert calibration == list(read_corpus("pydoc:calibration", "test").documents)
    assert not set(calibration) & set(test)
    validation = list(read_corpus("pydoc:validation", "test").documents)
    assert not set(validation) & set(calibration + test)
    assert sum(map(len, calibration)) > sum(map(len, test)) > 100_000


def test_sources_of_a_package_are_in_parts_that_share_nothing() -> None:
    parts = {
        name: list(read_corpus(f"package:click:{name}", "test").documents)
        for name in ("calibration", "validation", "test")
    }
    assert parts["calibration"] == list(read_corpus("package:click", "calibration").documents)
    paragraphs = [
        {p for text in texts for p in text.split("\n\n") if len(p) >= 80}
        for texts in parts.values()
    ]
    assert len(set().union(*paragraphs)) == sum(map(len, paragraphs)) > 100
    for spec, message in (
        ("package:nowhere_at_all", "package:python"),
        ("package:click:half", "package:click:test"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_corpus(spec, "test").documents)


def test_jsonl_field(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"a{i}", "body": f"b{i}"}) for i in range(3)))
    assert list(read_corpus(str(file), "test").documents) == ["a0", "a1", "a2"]
    assert list(read_corpus(f"{file}:body", "test").documents) == ["b0", "b1", "b2"]


@pytest.mark.parametrize("spec", ["pydoc:other", "none.txt", "none.jsonl"])
def test_unreadable_spec(spec: str) -> None:
    with pytest.raises(InputError, match=r"pydoc|does not exist"):
        list(read_corpus(spec, "test").documents)
