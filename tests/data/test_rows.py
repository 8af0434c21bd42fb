"""Documents of rows: what has no text is skipped and told, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lrcompress.data.conversations import ChatFormat
from lrcompress.data.rows import documents
from lrcompress.runtime.errors import InputError


def read(spec: str, *rows: Any, field: str | None = None) -> list[str]:
    chat = ChatFormat(None, is_plain=True)
    return list(documents(spec, ((f"line {n}", row) for n, row in enumerate(rows, 1)), field, chat))


def test_rows_without_text_are_skipped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": value} for value in ("a", None, "", " \n", "b")]
    with caplog.at_level(logging.WARNING):
        assert read("skipping", *rows) == read("skipping", *rows) == ["a", "b"]
    assert caplog.messages == [
        "Skipped 3 of the 5 rows read of 'skipping': 1 with null 'text', 2 with an empty 'text' "
        "(first: line 2)."
    ]


def test_a_text_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"'x' is empty \(2 with null 'body' \(first: line 1\)"):
        read("x", {"body": None}, {"body": None}, field="body")
    with pytest.raises(InputError, match=r"'x' is empty \(no rows\)"):
        read("x")


def test_line_ends_and_marks_do_not_change_a_text() -> None:
    assert read("x", {"text": "\ufeffa\r\nb\rc\n"}) == ["a\nb\nc\n"]


def test_the_field_is_the_text_or_else_a_conversation() -> None:
    said = [{"role": "user", "content": "hi"}]
    assert read("x", {"messages": said, "text": "a"}) == ["a"]
    assert read("x", {"messages": said}) == ["hi"]
    assert read("x", {"conversations": [{"from": "gpt", "value": "yo"}]}) == ["yo"]
    assert read("x", {"messages": said, "text": "a"}, field="messages") == ["hi"]
    rows = [("line 1", {"messages": said})]
    with pytest.raises(InputError, match="line 1 is a conversation, and this reads text only"):
        list(documents("x", rows, None, chat=None))
