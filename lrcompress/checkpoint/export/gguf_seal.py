"""A checksum of a GGUF file inside it, so that the file alone can be verified.

The metadata key KEY holds the SHA-256 of the file in which the 64 digits themselves are zeros.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from lrcompress.runtime.errors import InputError

KEY = "lrcompress.sha256"
BLANK = "0" * 64
# key, type (8: string) and length, as they stand in front of the digits; all little-endian
HEAD = KEY.encode() + (8).to_bytes(4, "little") + len(BLANK).to_bytes(8, "little")


def seal(file: Path) -> None:
    """Replaces the BLANK under KEY by the checksum of the file."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
        start = _digits_at(content)
        content[start : start + len(BLANK)] = _checksum(content, start).encode()


def is_sealed(file: Path) -> bool:
    """Whether the file is as it was when it was sealed.

    Raises InputError where it has no checksum.
    """
    with file.open("rb") as opened:
        if not opened.seek(0, 2):
            raise _no_checksum(file)
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = _digits_at(content)
            if start < len(HEAD):
                raise _no_checksum(file)
            return content[start : start + len(BLANK)] == _checksum(content, start).encode()


def _no_checksum(file: Path) -> InputError:
    return InputError(
        f"{str(file)!r} holds no checksum: `lrcompress export --to gguf` did not write it, or its "
        "first bytes are damaged"
    )


def _digits_at(content: mmap.mmap) -> int:
    """Position of the first digit; less than the length of HEAD where there is none."""
    return content.find(HEAD) + len(HEAD)


def _checksum(content: mmap.mmap, start: int) -> str:
    digest = hashlib.sha256()
    with memoryview(content) as view:
        for part in (view[:start], BLANK.encode(), view[start + len(BLANK) :]):
            digest.update(part)
            if isinstance(part, memoryview):
                part.release()
    return digest.hexdigest()
