"""Turns rows into documents: the text in a field, or a conversation as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrcompress.data.conversations import FIELDS as CONVERSATION_FIELDS
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.files import DEFAULT_FIELD
from lrcompress.data.text import Conversation, with_unix_lines
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.notices import notice

# Python types of values -> what JSON calls them
TYPE_NAMES = {
    bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object",
    type(None): "null",
}  # fmt: skip


@dataclass
class _Skipped:
    """Counts the rows of the text `spec`, and those without text by their reason."""

    spec: str
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_place: str = ""

    def add(self, reason: str, place: str) -> None:
        self.first_place = self.first_place or place
        self.reasons[reason] += 1

    def __str__(self) -> str:
        parts = (f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{', '.join(parts)} (first: {self.first_place})" if self.reasons else "no rows"

    def refuse_all(self) -> None:
        """Raises InputError where no row has text."""
        if self.reasons.total() == self.rows:
            raise InputError(f"data {self.spec!r} is empty ({self}): name one with text in it")

    def tell(self) -> None:
        """Says how much was skipped."""
        if 0 < (count := self.reasons.total()) < self.rows:
            notice(f"Skipped {count} of the {self.rows} rows read of {self.spec!r}: {self}.")


def documents(
    spec: str, rows: Iterable[tuple[str, Any]], name: str | None, chat: ChatFormat | None
) -> Iterator[str]:
    """The text in the field `name` of every row (place, value); None is text or a conversation.

    Line ends become those of Unix. Rows without text are skipped, and a notice says how many.
    Raises InputError, which names the place, where a row lacks the field or has no text there.
    """
    skipped = _Skipped(spec)
    try:
        for place, row in rows:
            skipped.rows += 1
            key, value = _field(place, row, name)
            text = "" if value is None else _text(place, key, value, chat)
            if text.strip():
                yield text if isinstance(text, Conversation) else with_unix_lines(text)
            else:
                skipped.add(f"with {'null' if value is None else 'an empty'} {key!r}", place)
        skipped.refuse_all()
    finally:
        skipped.tell()


def _field(place: str, row: Any, name: str | None) -> tuple[str, Any]:
    """The name of the field that is read, and its value."""
    if isinstance(row, str):
        row = {DEFAULT_FIELD: row}
    if not isinstance(row, Mapping):
        raise InputError(f"{place} is of type {_type(row)}: it has to be an object with fields")
    names = (DEFAULT_FIELD, *CONVERSATION_FIELDS) if name is None else (name,)
    for key in names:
        if key in row:
            return key, row[key]
    fields = ", ".join(map(str, row)) or "none"
    raise InputError(
        f"{place} has no field {names[0]!r} (fields: {fields}): name another after the text, "
        "as in FILE:FIELD"
    )


def _text(place: str, key: str, value: Any, chat: ChatFormat | None) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"{place}: field {key!r} is of type {_type(value)}, not text")
    if not value:
        return ""
    if chat is None:
        raise InputError(
            f"{place} is a conversation, and this reads text only: calibration, training and "
            "perplexity read conversations"
        )
    return chat.render(place, value)


def _type(value: Any) -> str:
    return TYPE_NAMES.get(type(value), type(value).__name__)
