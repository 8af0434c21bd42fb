"""One process at a time for each output, by a lock that ends with its process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lrcompress.runtime.atomic_io import parent_folders
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.paths import check_free

LOCK_FILE = ".lock"  # in a folder that a command fills


@contextmanager
def beside(out: Path | None, replace: bool = False) -> Iterator[None]:
    """Locks `out`, a folder that is written at the end of the work, by a file beside it.

    Does nothing if `out` is None. Raises InputError at once if another process holds the lock, or
    if `out` exists and `replace` is false. Under torchrun the main process holds the lock for all.
    """
    if out is None:
        yield
        return
    if not replace:
        run_on_main(lambda: check_free(out))
    with _held(out.absolute().with_name(f".{out.name}.lock"), out):
        yield


@contextmanager
def inside(out: Path) -> Iterator[None]:
    """Locks `out`, a folder that is filled during the work, by a file inside it."""
    with _held(out.absolute() / LOCK_FILE, out):
        yield


@contextmanager
def _held(file: Path, out: Path) -> Iterator[None]:
    with parent_folders(file):
        lock = FileLock(file, blocking=False)
        run_on_main(lambda: _take(lock, out))
        try:
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):  # before the release, while no other process can hold it
                    file.unlink()
                lock.release()


def _take(lock: FileLock, out: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another process is writing {str(out)!r}: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        reason = machine_fault_reason(error) or " ".join(str(error).split())
        raise MachineError(f"could not write {str(out)!r}: {reason}") from error
