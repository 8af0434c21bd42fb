"""Paths from users: what stands for a folder is expanded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("TEXTS", "~/texts")
    assert user_path("~/a.txt") == Path("/home/somebody/a.txt")
    assert user_path("$TEXTS/a.txt") == Path("/home/somebody/texts/a.txt")
    assert user_path("${HOME}/a.txt") == Path("/home/somebody/a.txt")
    assert user_path("price$/a~.txt") == Path("price$/a~.txt")


@pytest.mark.parametrize("text", ["a\0b", "a" * 5000])
def test_what_no_file_can_be_named_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="path"):
        user_path(text)
