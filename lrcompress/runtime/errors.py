"""Errors that a command shows as one sentence, and the reasons of those that the machine causes."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names the value and the remedy."""


class NotFiniteError(InputError):
    """What a model computes in its own precision is not finite; it may be in a wider one."""


class MachineError(RuntimeError):
    """The machine failed (disk full, no memory): one sentence that says what and where."""


MEMORY = "out of memory"


UNWRITTEN = "a file could not be written to its end"


REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the system allows (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this system",
    errno.ENOMEM: MEMORY,
}


# what libraries say that have no class, and no number, of their own for it
WORDS = {
    "out of memory": MEMORY,
    "can't allocate memory": MEMORY,
    "std::bad_alloc": MEMORY,
    "size calculation overflowed": MEMORY,
    "can't start new thread": "no thread can be started (out of memory, or ulimit -u)",
    "No space left": REASONS[errno.ENOSPC],
    "Too many open files": REASONS[errno.EMFILE],
    "PytorchStreamWriter": UNWRITTEN,
    "inline_container": UNWRITTEN,
}


NUMBER = re.compile(r"(?:os error |\[Errno )(\d+)")


def validation_reason(error: ValidationError) -> str:
    """The first mistake that pydantic found, as "field: reason"."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    reason = f"{message[0].lower()}{message[1:]}"
    return f"{field}: {reason}" if field else reason


def machine_fault_reason(error: BaseException) -> str | None:
    """What of the machine failed, of `error` or what it came from; None if nothing did."""
    for one in _chain(error):
        found = MEMORY if isinstance(one, MemoryError) else _reason_of(one)
        if found:
            return found
    return None


def _reason_of(error: BaseException) -> str | None:
    text = str(error)
    said = NUMBER.search(text)
    number = error.errno if isinstance(error, OSError) else None
    found = REASONS.get(number or (int(said[1]) if said else 0))
    return found or next((why for words, why in WORDS.items() if words in text), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
