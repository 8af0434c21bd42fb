"""Makes text from outside safe to show: no control characters, limited length."""

from __future__ import annotations

import unicodedata

MAX_MESSAGE_LENGTH = 2000  # characters


def printable(text: str) -> str:
    """`text` with every unprintable character escaped: controls, line ends, lone surrogates."""
    return "".join(char if _is_printable(char) else _escaped(char) for char in text)


def shortened(text: str, max_length: int = MAX_MESSAGE_LENGTH) -> str:
    """`text`, or its first `max_length` characters and "…" if it is longer."""
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def _is_printable(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
