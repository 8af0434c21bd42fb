"""Writing that leaves either the old or the new state, and the templates of what is written."""

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

# of Linux' renameat2: paths are relative to the working directory; the two change names
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def writing(out: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well.

    Whatever goes wrong, `out` is as it was: complete or absent; with `replace` an older folder
    gives way only then. Raises MachineError where the disk is full or cannot be written.
    """
    if not replace:
        check_free(out)
    try:
        with parents(out):
            _clear_abandoned(out)
            partial = _hidden(out)
            try:
                yield partial
                partial.chmod(0o755)
                _take_place(partial, out, replace)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:
        if why := _write_failure(error):
            raise MachineError(
                f"could not write {str(out)!r}: {why}; nothing was left there"
            ) from error
        raise


@contextmanager
def parents(path: Path) -> Iterator[None]:
    """Makes the folders that `path` is to be in; an error removes those that were made for it."""
    above = path.absolute().parents
    created = [folder for folder in above if not folder.exists()]
    try:
        above[0].mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in created:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _hidden(out: Path) -> Path:
    """A new folder beside `out` that `_clear_abandoned` knows."""
    prefix = f".{out.name}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=out.absolute().parent))


def discard(folder: Path, out: Path) -> None:
    """Removes what was kept of the work on `out`. A kill leaves all of it or, under a name that
    nobody goes on from, a part."""
    if folder.is_dir():
        doomed = _hidden(out)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _take_place(partial: Path, out: Path, replace: bool) -> None:
    if not replace:
        check_free(out)  # another process may have been here
    if not out.exists():
        partial.rename(out)
    elif not _exchanged(partial, out):
        old = partial.with_suffix(".old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two folders have changed names, in one step; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    paths = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return exchange is not None and exchange(*paths) == 0


def _clear_abandoned(out: Path) -> None:
    """Removes hidden folders of processes that were killed while they wrote `out`."""
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
def keeping(what: str) -> Iterator[None]:
    """Around the writing of what the same command goes on from when it is given again.

    Raises MachineError, which names `what`, where the disk is full or cannot be written.
    """
    try:
        yield
    except Exception as error:
        if why := _write_failure(error):
            raise MachineError(
                f"could not keep {what}: {why}; {_remedy(why)}, then the same command goes on"
            ) from error
        raise


def _remedy(why: str) -> str:
    return "free some space" if "full" in why else "mend that"


def replace_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file in one rename; its folder is made if it is missing."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_failure(error: Exception) -> str | None:
    """Why nothing could be written, if that is what `error` says; libraries have classes of their
    own for it."""
    if isinstance(error, InputError | MachineError):
        return None
    why = machine_fault_reason(error)
    return why or (" ".join(str(error).split()) if isinstance(error, OSError) else None)


def replace_text(file: Path, text: str) -> None:
    """Writes `file` in one rename. Raises MachineError where it cannot be written."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # a link of that name would be written through
    try:
        partial.write_text(text, "utf-8")
        partial.replace(file)
    except OSError as error:
        raise MachineError(f"could not write {str(file)!r}: {_write_failure(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
