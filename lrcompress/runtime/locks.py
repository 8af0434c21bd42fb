"""One process at a time for each output, by a lock that the system takes back from a dead one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lrcompress.runtime.atomic_io import parents
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.paths import check_free

INSIDE = ".lock"  # of a folder that a command works in


@contextmanager
def beside(out: Path | None, replace: bool = False) -> Iterator[None]:
    """Around all work on `out`, a folder that is written when the work is done, if one is.

    Raises InputError at once where another process is at it, or where it exists and is not to be
    replaced. Under torchrun the main process holds the lock for all.
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
    """The same for a folder that is made first and filled, stage by stage."""
    with _held(out.absolute() / INSIDE, out):
        yield


@contextmanager
def _held(file: Path, out: Path) -> Iterator[None]:
    with parents(file):
        lock = FileLock(file, blocking=False)
        run_on_main(lambda: _take(lock, out))
        try:
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):  # before the release: nobody else's yet
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
        why = machine_fault_reason(error) or " ".join(str(error).split())
        raise MachineError(f"could not write {str(out)!r}: {why}") from error
