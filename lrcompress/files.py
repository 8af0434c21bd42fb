"""Writing that leaves either the old or the new state, and the templates of what is written."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lrcompress.protocols import InputError, MachineError

if TYPE_CHECKING:
    from torch import Tensor


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


@contextmanager
def writing(out: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well.

    Whatever goes wrong, `out` is as it was: complete or absent; with `replace` an older folder
    gives way only then. Raises MachineError where the disk is full or cannot be written.
    """
    if not replace:
        check_free(out)
    parent = out.absolute().parent
    created = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(out)
        prefix = f".{out.name}.{os.getpid()}."
        partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
        try:
            yield partial
            partial.chmod(0o755)
            _take_place(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if _is_write_failure(error):
            raise _failed(out, error) from error
        raise


def _take_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_suffix(".old")
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
    except Exception as error:  # libraries have classes of their own for a full disk
        if not _is_write_failure(error):
            raise
        raise MachineError(
            f"could not keep {what}: {_reason(error)}; {_remedy(error)}, then the same command "
            "goes on"
        ) from error


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


def _is_write_failure(error: BaseException) -> bool:
    return isinstance(error, OSError) or any(
        words in str(error) for words in ("No space left", "I/O error")
    )


def _failed(out: Path, error: BaseException) -> MachineError:
    return MachineError(f"could not write {str(out)!r}: {_reason(error)}; nothing was left there")


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _reason(error: BaseException) -> str:
    return "the disk is full" if _is_full(error) else " ".join(str(error).split())


def _remedy(error: BaseException) -> str:
    return "free some space" if _is_full(error) else "mend that"


def replace_text(file: Path, text: str) -> None:
    """Writes `file` in one rename."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # a link of that name would be written through
    try:
        partial.write_text(text, "utf-8")
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# of the texts that stand for numbers which JSON lacks
NOT_FINITE = "^(NaN|-?Infinity)$"


def json_text(content: Any) -> str:
    """Valid JSON, also where numbers are not finite."""
    return json.dumps(finite(content), indent=2, allow_nan=False, default=str) + "\n"


def finite(value: Any) -> Any:
    """`value` with texts for the numbers in it that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(float(value))
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def safe_name(text: str) -> str:
    """`text` as a part of a path: other characters than those of plain words become _."""
    return re.sub(r"[^\w+=.,-]", "_", text).strip(".")[:120] or "_"


def places(names: Iterable[str]) -> dict[str, str]:
    """Each with a name for a file or folder of its own: where alike, with numbers."""
    found: dict[str, str] = {}
    for one in names:
        place, number = safe_name(one), 1
        while place in found.values():
            number += 1
            place = f"{safe_name(one)}-{number}"
        found[one] = place
    return found


def render(template: str, escape: bool, **values: Any) -> str:
    """A template of this package, with HTML escaping where `escape` says so."""
    environment = Environment(
        loader=PackageLoader("lrcompress", "."),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
