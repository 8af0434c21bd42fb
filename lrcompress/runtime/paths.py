"""Checks of paths from user input, and safe file names."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from lrcompress.runtime.errors import InputError


def check_free(out: Path) -> None:
    """Raises InputError if `out` exists, or if its parent is not a writable folder."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output {str(out)!r} exists: choose another name, or remove it")
    check_parent(out)


def check_parent(out: Path) -> None:
    """Raises InputError if `out` cannot be made, because a folder above it cannot be written to."""
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r}: {str(parent)!r} is not a folder to write to")


def is_inside(path: str) -> bool:
    """Whether the relative `path` stays inside the folder that it starts from; ignores links."""
    pure = PurePath(path)
    return not pure.is_absolute() and ".." not in pure.parts


def user_path(text: str) -> Path:
    """`text` as a path, with ~ and $VARIABLES expanded.

    Raises InputError if no file can have this path.
    """
    try:
        path = Path(os.path.expandvars(text)).expanduser()
        path.stat()
    except (RuntimeError, ValueError) as error:  # unknown user, or a NUL character
        raise InputError(f"{text!r} is not a path ({error}): give another") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{text[:80]!r}… is too long for a path: give another") from None
    return path


def refuse_links(folder: Path) -> None:
    """Raises InputError if an entry of `folder` is a link: writing to it or removing below it
    would change files elsewhere."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink():
            raise InputError(
                f"{str(entry)!r} is a link, and a run writes only inside its own folder: replace "
                "the link by its target, or choose another folder"
            )


def safe_name(text: str) -> str:
    """`text` as a file name: characters other than letters, digits and +=.,- become _."""
    return re.sub(r"[^\w+=.,-]", "_", text).strip(".")[:120] or "_"


def unique_file_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> file name; names with equal safe names get a number at the end."""
    file_names: dict[str, str] = {}
    for name in names:
        file_name, number = safe_name(name), 1
        while file_name in file_names.values():
            number += 1
            file_name = f"{safe_name(name)}-{number}"
        file_names[name] = file_name
    return file_names
