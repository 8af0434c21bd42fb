"""docs/refused.md quotes sentences that the code says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path("docs/refused.md").read_text("utf-8")
QUOTES = [
    quote
    for row in re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    for quote in re.findall(r"`([^`]+)`", row)
]


@cache
def texts() -> list[str]:
    """Every text in the code; what is filled in later stands as three dots."""
    found = []
    for file in Path("lrcompress").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values
                )
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_page_quotes() -> None:
    assert len(QUOTES) > 25


@pytest.mark.parametrize("quote", QUOTES)
def test_each_quote_is_of_the_code(quote: str) -> None:
    assert any(quote in text for text in texts())
