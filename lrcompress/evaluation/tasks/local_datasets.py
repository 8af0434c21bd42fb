"""lm-eval's built-in tasks on local copies of their data sets, instead of the hub's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import is_inside

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
ALL = "default"  # the only configuration of a folder that declares none


@contextmanager
def reading_copies(folder: Path, task: str) -> Iterator[None]:
    """While it is open, `datasets.load_dataset` reads from `folder`, for lm-eval's `task`.

    Raises InputError where there is no copy, or it cannot be read or lacks what the task needs.
    """
    import datasets

    original, copies = datasets.load_dataset, _Copies(folder, task, datasets.load_dataset)
    datasets.load_dataset = copies.load
    try:
        yield
    except (KeyError, ValueError, TemplateError) as error:
        if isinstance(error, InputError) or copies.last is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"task {task!r}: {str(copies.last)!r} has not what it needs: {reason}"
            + (" is missing" if isinstance(error, KeyError) else "")
        ) from error
    finally:
        datasets.load_dataset, copies.closed = original, True


@dataclass
class _Copies:
    """`datasets.load_dataset` over a folder; once closed, the original, for who kept hold of it."""

    folder: Path
    task: str
    original: Callable[..., Any]
    last: Path | None = None
    closed: bool = False

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        if self.closed:
            return self.original(path, name, **options)
        self.last = self._find(path)
        try:
            found = self._read(self.last, name)
        except InputError:
            raise
        except Exception as error:  # each format has its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"task {self.task!r}: {str(self.last)!r} cannot be read as a data set: {reason}"
            ) from error
        return found[options["split"]] if options.get("split") else found

    def _find(self, path: str) -> Path:
        names = (path, path.replace("/", "__"), path.replace("/", "--"), Path(path).name, self.task)
        for name in names:
            if is_inside(name) and (self.folder / name).is_dir():
                return self.folder / name
        wanted = ", ".join(dict.fromkeys((f"{self.task}.jsonl", *names)))
        raise InputError(
            f"task {self.task!r}: {str(self.folder)!r} has no copy of its data set {path!r} "
            f"(looked for {wanted})"
        )

    def _read(self, folder: Path, name: str | None) -> Any:
        import datasets

        if name and is_inside(name) and (folder / name).is_dir():
            folder, name = folder / name, None
        if any((folder / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(str(folder))
            whole = isinstance(found, datasets.DatasetDict)
            return found if whole else datasets.DatasetDict({str(found.split): found})
        known = datasets.get_dataset_config_names(str(folder))
        if known == [ALL]:
            name = None
        elif name not in known:
            raise InputError(
                f"task {self.task!r}: {str(folder)!r} has no {name!r} (but {', '.join(known)}): "
                "put it into a folder of that name"
            )
        return self.original(str(folder), name)
