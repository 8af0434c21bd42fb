"""The folder of a resumable workflow: a recipe, the results so far, and the report."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import Stage
from lrcompress.config import Section
from lrcompress.config.recipe import to_yaml
from lrcompress.reporting import figures
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_parent, refuse_links

T = TypeVar("T")

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class ResultFile(Generic[T]):
    """A JSON file with one result of type `kind` under `key`, and the digest of its inputs.

    `inputs` below is everything that the result depends on, and `stages` are all stages whose
    code makes it: a change of either makes the file stale.
    """

    path: Path
    key: str
    kind: type[T]

    def stored(self) -> T:
        """The result in the file, whatever its inputs. ValidationError if missing or damaged."""
        return self._result(fingerprints.read_state(self.path))

    def read(self, inputs: object, stages: Collection[Stage]) -> T | None:
        """The result, or None where the file is missing, damaged, or made from other inputs."""
        content = fingerprints.read_state(self.path)
        if content.get("inputs") == fingerprints.digest(inputs, *stages):
            with suppress(ValidationError):
                return self._result(content)
        return None

    def _result(self, content: Mapping[str, Any]) -> T:
        return TypeAdapter(self.kind).validate_python(content.get(self.key))

    def cached(self, inputs: object, stages: Collection[Stage], make: Callable[[], T]) -> T:
        """The result in the file, if it was made from the same inputs; else makes and writes it."""
        result = self.read(inputs, stages)
        if result is not None:
            return result
        adapter = TypeAdapter(self.kind)
        content = adapter.dump_python(make(), mode="json")
        self.path.parent.mkdir(exist_ok=True)
        digest = fingerprints.digest(inputs, *stages)
        fingerprints.write_state(self.path, {"inputs": digest, self.key: content})
        return adapter.validate_python(content)


@dataclass(frozen=True)
class WorkFolder(ABC):
    """The folder `out` of one recipe: recipe.yaml, a subfolder of results, and the report."""

    recipe: Section
    out: Path

    # set by each workflow
    kind: ClassVar[str]
    """What error messages call the folder."""
    reports: ClassVar[Collection[str]]
    """File names of the report, figures aside."""
    results: ClassVar[str]
    """Name of the subfolder that keeps results."""

    def refuse_foreign(self) -> None:
        """Raises InputError if an entry of the folder is a link or not from this workflow, and if
        the folder cannot be made."""
        refuse_links(self.out)
        if not self.out.exists():
            check_parent(self.out)
        elif not self._is_ours():
            raise InputError(
                f"output {str(self.out)!r} exists and is no {self.kind}: choose another name"
            )

    def _is_ours(self) -> bool:
        return self.out.is_dir() and self._are_ours({path.name for path in self.out.iterdir()})

    @abstractmethod
    def _are_ours(self, names: set[str]) -> bool:
        """Whether a folder with the entries `names` is empty or was written by this workflow."""

    def claim(self) -> None:
        """Makes the folder, and writes the recipe into it. Raises InputError for other content."""
        self.refuse_foreign()
        (self.out / self.results).mkdir(parents=True, exist_ok=True)
        if self.has_other_recipe():
            self.drop_reports()
        self.write_recipe()

    def has_other_recipe(self) -> bool:
        """Whether recipe.yaml is there and differs from this folder's recipe."""
        file = self.out / RECIPE
        return file.is_file() and file.read_bytes() != to_yaml(self.recipe).encode()

    def write_recipe(self) -> None:
        """Writes the resolved recipe to recipe.yaml."""
        replace_text(self.out / RECIPE, to_yaml(self.recipe))

    def drop_reports(self) -> None:
        """Removes the report and its figures: they show results that are about to change."""
        for name in self.reports:
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.out / figures.FOLDER, ignore_errors=True)


def partial_names(names: Iterable[str]) -> set[str]:
    """Names of the half-written files that a killed process leaves beside the files `names`."""
    return {f".{name}.partial" for name in names}
