"""Lets the Python files of tasks import those beside them, as they would when run as scripts."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lrcompress.runtime.errors import InputError

PACKAGE_FILE = "__init__.py"


class SiblingImport(NamedTuple):
    """An import of `name`, in the file `importer`, that stands for `location`.

    That is a module's file, the first file of a package, or a folder without one.
    """

    importer: Path
    name: str
    location: Path


def make_importable(modules: Iterable[Path]) -> None:
    """Lets `modules`, which lm-eval loads by path, import what stands beside them, now and later.

    Modules of these names that earlier calls found elsewhere are forgotten. Raises InputError where
    one name stands for two files, or Python finds another module by it.
    """
    imports = list(_sibling_imports(modules))
    locations: dict[str, Path] = {}
    for sibling in imports:
        if locations.setdefault(sibling.name, sibling.location) != sibling.location:
            raise InputError(
                f"tasks import {sibling.name!r} from {str(locations[sibling.name])!r} and from "
                f"{str(sibling.location)!r}, and Python knows one module of a name: rename one"
            )
    finder = _finder()
    for sibling in imports:
        finder.forget_other(sibling.name, sibling.location)
        _check_not_shadowed(sibling)
        finder.locations[sibling.name] = sibling.location


class SiblingFinder(MetaPathFinder):
    """Finds modules in `locations`, by name. Python asks it last."""

    def __init__(self) -> None:
        self.locations: dict[str, Path] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        location = self.locations.get(fullname)
        if location is None or not location.exists():
            return None
        if location.is_dir():
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(location)]
            return spec
        folders = [str(location.parent)] if location.name == PACKAGE_FILE else None
        return spec_from_file_location(fullname, location, submodule_search_locations=folders)

    def forget_other(self, name: str, location: Path) -> None:
        """Forgets another module `name`, and the modules of the tasks beside it, which use it."""
        other = self.locations.get(name)
        if other is None or other == location:
            return
        folder = _folder(other)
        siblings = {key for key, path in self.locations.items() if _folder(path) == folder}
        for module in [*sys.modules]:
            # lm-eval calls modules by their path
            if module.partition(".")[0] in siblings or module.startswith(f"{folder}/"):
                del sys.modules[module]
        for sibling in siblings:
            del self.locations[sibling]


def _folder(location: Path) -> Path:
    """The folder in which a module or package is."""
    return location.parent.parent if location.name == PACKAGE_FILE else location.parent


def _finder() -> SiblingFinder:
    """The finder of this process, which is added where there is none."""
    finder = next((item for item in sys.meta_path if isinstance(item, SiblingFinder)), None)
    if finder is None:
        finder = SiblingFinder()
        sys.meta_path.append(finder)
    return finder


def _check_not_shadowed(sibling: SiblingImport) -> None:
    """Raises InputError where Python finds another module by that name, such as its own."""
    try:
        spec = find_spec(sibling.name)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    folders = list(spec.submodule_search_locations or ())
    origin = spec.origin or (folders[0] if folders else "another module")
    if Path(origin).resolve() != sibling.location.resolve():
        raise InputError(
            f"{str(sibling.importer)!r} imports {sibling.name!r}, which is "
            f"{str(sibling.location)!r} and also another module of this Python ({origin}): rename "
            "the one beside the task"
        )


def _sibling_imports(modules: Iterable[Path]) -> Iterator[SiblingImport]:
    """Every import of what is in the folder of `modules`, over several steps."""
    remaining = [(module, module.parent) for module in modules]
    seen: set[Path] = set()
    while remaining:
        module, folder = remaining.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in _imported_names(module):
            if (location := _location(folder, name)) is not None:
                yield SiblingImport(module, name, location)
                remaining += [(file, folder) for file in _files(location)]


def _location(folder: Path, name: str) -> Path | None:
    """Where `name` is in `folder`, in Python's order; None where it is not."""
    package = folder / name
    candidates = (package / PACKAGE_FILE, folder / f"{name}.py")
    location = next(filter(Path.is_file, candidates), None)
    if location is None and package.is_dir() and any(package.glob("*.py")):
        return package
    return location


def _files(location: Path) -> list[Path]:
    """The Python files of a module or package."""
    if location.is_dir() or location.name == PACKAGE_FILE:
        return sorted((location if location.is_dir() else location.parent).glob("**/*.py"))
    return [location]


def _imported_names(module: Path) -> Iterator[str]:
    """The first parts of the names that a file imports; none where it cannot be parsed."""
    try:
        tree = ast.parse(module.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
