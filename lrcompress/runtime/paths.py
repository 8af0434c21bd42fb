"""Paths that users give: checked before anything is read or written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from lrcompress.runtime.errors import InputError


def check_free(out: Path) -> None:
    """Raises InputError if something stands at `out`, or its parent is no folder to write to."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output {str(out)!r} exists: choose another folder, or remove it")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r}: {str(parent)!r} is not a folder to write to")


def is_inside(path: str) -> bool:
    """Whether `path`, taken below a folder, stays there, links aside."""
    parts = PurePath(path)
    return not parts.is_absolute() and ".." not in parts.parts


def user_path(text: str) -> Path:
    """`text` as a path, with ~ as the user's folder; InputError where nothing could be there."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except (RuntimeError, ValueError) as error:  # no such user, a character of no path
        raise InputError(f"{text!r} is no path ({error}): give another") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{text[:80]!r}… is too long for a path: give another") from None
    return path


def refuse_links(folder: Path) -> None:
    """Raises InputError where an entry of `folder` is a link: what is written or removed below it
    would be somewhere else."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink():
            raise InputError(
                f"{str(entry)!r} is a link, and a run writes into its own folder alone: put what "
                "it leads to in its place, or choose another folder"
            )


def safe_name(text: str) -> str:
    """`text` as a part of a path: other characters than those of plain words become _."""
    return re.sub(r"[^\w+=.,-]", "_", text).strip(".")[:120] or "_"


def unique_file_names(names: Iterable[str]) -> dict[str, str]:
    """Each with a name for a file or folder of its own: where alike, with numbers."""
    found: dict[str, str] = {}
    for one in names:
        place, number = safe_name(one), 1
        while place in found.values():
            number += 1
            place = f"{safe_name(one)}-{number}"
        found[one] = place
    return found
