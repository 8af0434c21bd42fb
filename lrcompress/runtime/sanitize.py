"""Text from outside as it may be shown: nothing in it moves a cursor, hides or breaks a line."""

from __future__ import annotations

import unicodedata

# characters of a message, at most
LONGEST = 2000


def printable(text: str) -> str:
    """`text` with escapes for what is no printable character: controls, line ends, half pairs."""
    return "".join(one if _is_shown(one) else _escaped(one) for one in text)


def shortened(text: str, longest: int = LONGEST) -> str:
    """`text`, or its beginning where it is longer."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
