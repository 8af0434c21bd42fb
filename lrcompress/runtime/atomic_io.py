"""Atomic writes: after a failure or a kill, a path holds its old or its new state, never a mix."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.paths import check_free

if TYPE_CHECKING:
    from torch import Tensor

# arguments of Linux' renameat2: paths are relative to the working directory; swap two names
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def writing(out: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden folder beside `out` that is renamed to `out` when the block succeeds.

    After an error `out` is as it was before. With `replace`, a folder at `out` is replaced at the
    end; without it, raises InputError if `out` exists. Raises MachineError if the disk is full or
    cannot be written.
    """
    if not replace:
        check_free(out)
    with _partial_folder(out) as partial:
        yield partial
        partial.chmod(0o755)
        _take_place(partial, out, replace)


@contextmanager
def writing_file(out: Path) -> Iterator[Path]:
    """A file to write in a hidden folder beside `out`, which is moved to `out` when the block
    succeeds.

    After an error nothing is left. Raises InputError if `out` exists, MachineError if the disk is
    full or cannot be written.
    """
    check_free(out)
    with _partial_folder(out) as partial:
        file = partial / out.name
        yield file
        check_free(out)  # another process may have written it in the meantime
        file.rename(out)


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which is removed at the end if it is still there."""
    try:
        with parent_folders(out):
            _clear_abandoned(out)
            partial = _hidden_folder(out)
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        if reason := _write_failure(error):
            raise MachineError(
                f"could not write {str(out)!r}: {reason}; nothing was left there"
            ) from error
        raise


@contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Creates the parent folders of `path`; after an error, removes those that it created."""
    folders = path.absolute().parents
    created = [folder for folder in folders if not folder.exists()]
    try:
        folders[0].mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in created:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _hidden_folder(out: Path) -> Path:
    """A new folder beside `out`, with a name that `_clear_abandoned` recognizes."""
    prefix = f".{out.name}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=out.absolute().parent))


def discard(folder: Path, out: Path) -> None:
    """Removes `folder`, the unfinished work on `out`, if it exists.

    It is renamed first, so that a kill never leaves a part of it under a name that is resumed.
    """
    if folder.is_dir():
        trash = _hidden_folder(out)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _take_place(partial: Path, out: Path, replace: bool) -> None:
    if not replace:
        check_free(out)  # another process may have written it in the meantime
    if not out.exists():
        partial.rename(out)
    elif not _exchange_names(partial, out):
        old = partial.with_suffix(".old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange_names(first: Path, second: Path) -> bool:
    """Swaps the names of two folders in one step; False where the system cannot do this."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    failed = renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return not failed


def _clear_abandoned(out: Path) -> None:
    """Removes the hidden folders of processes that were killed while they wrote `out`."""
    for folder in out.absolute().parent.glob(f".{out.name}.*"):
        pid = folder.name.removeprefix(f".{out.name}.").partition(".")[0]
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if folder.suffix == ".old" and not out.exists():
            folder.rename(out)  # killed between the two renames
        elif folder.suffix in (".old", ".partial"):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def writing_state(description: str) -> Iterator[None]:
    """Around code that writes the state from which an interrupted command resumes.

    Raises MachineError with the `description` of the state if the disk is full or cannot be
    written.
    """
    try:
        yield
    except Exception as error:
        if reason := _write_failure(error):
            remedy = "free some space" if "full" in reason else "correct this"
            raise MachineError(
                f"could not keep {description}: {reason}; {remedy}, then the same command goes on"
            ) from error
        raise


def replace_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically; creates its folder if it is missing."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_failure(error: Exception) -> str | None:
    """Why a file could not be written; None if `error` is of another kind."""
    if isinstance(error, InputError | MachineError):
        return None
    reason = machine_fault_reason(error)
    return reason or (" ".join(str(error).split()) if isinstance(error, OSError) else None)


def replace_text(file: Path, text: str, shared: bool = False) -> None:
    """Writes a text file atomically, in UTF-8. Raises MachineError if it cannot be written.

    `shared`: several processes may write the file at the same time, so each writes a partial file
    of its own.
    """
    suffix = f".{os.getpid()}.partial" if shared else ".partial"
    partial = file.with_name(f".{file.name}{suffix}")
    partial.unlink(missing_ok=True)  # if it is a link, writing would change its target
    try:
        partial.write_text(text, "utf-8")
        partial.replace(file)
    except OSError as error:
        raise MachineError(f"could not write {str(file)!r}: {_write_failure(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
