"""Errors that a command shows as one sentence, and the reasons for faults of the machine."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """User input is invalid: one sentence that names the value and the remedy."""


class NotFiniteError(InputError):
    """A model gives NaN or infinity in its own precision; a wider precision may help."""


class MachineError(RuntimeError):
    """The machine failed (disk full, no memory): one sentence that says what and where."""


OUT_OF_MEMORY = "out of memory"
INCOMPLETE_WRITE = "a file could not be written to its end"
REASON_BY_ERRNO = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the system allows (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this system",
    errno.ENOMEM: OUT_OF_MEMORY,
}
# parts of messages of libraries that raise neither an exception class nor an errno for the fault
REASON_BY_MESSAGE = {
    "out of memory": OUT_OF_MEMORY,
    "can't allocate memory": OUT_OF_MEMORY,
    "std::bad_alloc": OUT_OF_MEMORY,
    "size calculation overflowed": OUT_OF_MEMORY,
    "can't start new thread": "no thread can be started (out of memory, or ulimit -u)",
    "No space left": REASON_BY_ERRNO[errno.ENOSPC],
    "Too many open files": REASON_BY_ERRNO[errno.EMFILE],
    "PytorchStreamWriter": INCOMPLETE_WRITE,
    "inline_container": INCOMPLETE_WRITE,
}
ERRNO_IN_MESSAGE = re.compile(r"(?:os error |\[Errno )(\d+)")


def validation_reason(error: ValidationError) -> str:
    """The first mistake that pydantic reports, as "field: reason"."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    reason = f"{message[0].lower()}{message[1:]}"
    return f"{field}: {reason}" if field else reason


def machine_fault_reason(error: BaseException) -> str | None:
    """The fault of the machine that `error` or one of its causes reports; None if there is none."""
    for cause in _causes(error):
        reason = OUT_OF_MEMORY if isinstance(cause, MemoryError) else _reason_of(cause)
        if reason:
            return reason
    return None


def _reason_of(error: BaseException) -> str | None:
    text = str(error)
    match = ERRNO_IN_MESSAGE.search(text)
    number = error.errno if isinstance(error, OSError) else None
    reason = REASON_BY_ERRNO.get(number or (int(match[1]) if match else 0))
    return reason or next((why for part, why in REASON_BY_MESSAGE.items() if part in text), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
