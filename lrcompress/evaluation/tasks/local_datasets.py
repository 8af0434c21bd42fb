"""Lets lm-eval's built-in tasks read local copies of their data sets instead of the hub's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lrcompress.data.files import KINDS, suffix
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import is_inside

SAVE_TO_DISK_FILES = ("dataset_dict.json", "state.json")  # datasets' save_to_disk writes one
SPLIT_NAMES = {"train", "validation", "val", "dev", "test"}
DEFAULT_CONFIG = "default"  # the only configuration of a folder that declares none


@contextmanager
def reading_copies(folder: Path, task: str) -> Iterator[None]:
    """Inside the block, `datasets.load_dataset` reads from `folder`, for lm-eval's `task`.

    Raises InputError where `folder` has no copy, the copy cannot be read, or it lacks a column or
    split that the task needs.
    """
    import datasets

    original = datasets.load_dataset
    loader = _LocalLoader(folder, task, original)
    datasets.load_dataset = loader.load
    try:
        yield
    except (KeyError, ValueError, TemplateError) as error:
        if isinstance(error, InputError) or loader.last_folder is None:
            raise
        raise InputError(
            f"task {task!r}: {str(loader.last_folder)!r} does not have what it needs: "
            + _one_line(error)
            + (" is missing" if isinstance(error, KeyError) else "")
        ) from error
    finally:
        datasets.load_dataset = original
        loader.is_closed = True


def _split_files(folder: Path) -> dict[str, str]:
    """Split -> name of its file, where all files are named exactly by split and are of one kind.

    Without this, `datasets` reads dev.jsonl as the split validation, and tasks that ask for dev
    do not find it. Tasks that ask for validation find dev where there is no other.
    """
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    splits = {file.name.partition(".")[0]: file.name for file in files}
    kinds = {KINDS.get(suffix(file)) for file in files}
    are_named_by_split = splits.keys() <= SPLIT_NAMES and len(splits) == len(files)
    if not are_named_by_split or len(kinds) != 1 or None in kinds:
        return {}
    other = splits.get("val") or splits.get("dev")
    return ({"validation": other} if other else {}) | splits


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@dataclass
class _LocalLoader:
    """Replaces `datasets.load_dataset`; after it is closed it calls the original, because lm-eval
    may have stored a reference to it."""

    folder: Path
    task: str
    original: Callable[..., Any]
    last_folder: Path | None = None
    is_closed: bool = False

    def load(self, path: str, name: str | None = None, **options: Any) -> Any:
        if self.is_closed:
            return self.original(path, name, **options)
        self.last_folder = self._find(path)
        try:
            dataset = self._read(self.last_folder, name)
        except InputError:
            raise
        except Exception as error:  # every format raises its own types
            reason = _one_line(error) or type(error).__name__
            raise InputError(
                f"task {self.task!r}: {str(self.last_folder)!r} cannot be read as a data set: "
                f"{reason}"
            ) from error
        return dataset[options["split"]] if options.get("split") else dataset

    def _find(self, path: str) -> Path:
        names = (path, path.replace("/", "__"), path.replace("/", "--"), Path(path).name, self.task)
        for name in names:
            if is_inside(name) and (self.folder / name).is_dir():
                return self.folder / name
        candidates = ", ".join(dict.fromkeys((f"{self.task}.jsonl", *names)))
        raise InputError(
            f"task {self.task!r}: {str(self.folder)!r} has no copy of its data set {path!r} "
            f"(looked for {candidates})"
        )

    def _read(self, folder: Path, config: str | None) -> Any:
        """The data set in `folder`: a subfolder named like the configuration comes first."""
        import datasets

        if config and is_inside(config) and (folder / config).is_dir():
            folder, config = folder / config, None
        if any((folder / file).is_file() for file in SAVE_TO_DISK_FILES):
            dataset = datasets.load_from_disk(str(folder))
            if isinstance(dataset, datasets.DatasetDict):
                return dataset
            return datasets.DatasetDict({str(dataset.split): dataset})
        if splits := _split_files(folder):
            return self.original(str(folder), data_files=splits)
        configs = datasets.get_dataset_config_names(str(folder))
        if configs == [DEFAULT_CONFIG]:
            config = None
        elif config not in configs:
            raise InputError(
                f"task {self.task!r}: {str(folder)!r} has no configuration {config!r} (only "
                f"{', '.join(configs)}): put the data into a folder of that name"
            )
        return self.original(str(folder), config)
