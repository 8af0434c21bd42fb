"""The Python code that lm-eval runs for a task: its own modules, and those that they import."""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import SOURCE_SUFFIXES, ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

# folders of installed packages, whose versions are recorded, or whose code is not a user's own
INSTALLED_FOLDERS = {"site-packages", "dist-packages"}
# functions that can import modules whose names are not in the source: Python's own, and others
BUILT_IN_IMPORTERS = {"__import__", "eval", "exec"}
IMPORTERS = {"import_module", "load_module", "run_module", "run_path", "spec_from_file_location"}
LRCOMPRESS = Path(__file__).parents[2]


class UntrackedCodeError(Exception):
    """Code whose source cannot be told; the message says why, as a part of a sentence."""


def sources(value: Any) -> dict[str, str]:
    """Module -> source of what the function or class `value` may run.

    That is its own module, and every module that it imports, also inside functions and over several
    steps, unless it is installed. Raises UntrackedCodeError where a module has no source, may
    import others by computed names, or was edited after it was imported.
    """
    module = inspect.getmodule(value)
    if module is None:
        raise UntrackedCodeError(f"the module of {value!r} is unknown")
    texts: dict[str, str] = {}
    remaining = [(module.__name__, _file(module))]
    while remaining:
        name, file = remaining.pop()
        if name not in texts and file is not None:
            texts[name] = _source(name, file)
            if not _is_installed(file):
                remaining += _imported(name, file, texts[name])
    return texts


def _file(module: ModuleType) -> Path | None:
    """None for a module that is built into Python."""
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def _is_installed(file: Path) -> bool:
    roots = (Path(sysconfig.get_path("stdlib")), LRCOMPRESS)
    return bool(INSTALLED_FOLDERS & {*file.parts}) or any(map(file.is_relative_to, roots))


def _source(name: str, file: Path) -> str:
    """The source of a module, empty for a compiled one that is installed."""
    if file.suffix not in SOURCE_SUFFIXES:
        if _is_installed(file):
            return ""
        raise UntrackedCodeError(f"{str(file)!r} is compiled")
    if not _is_installed(file) and _is_edited(name, file):
        raise UntrackedCodeError(f"{str(file)!r} was edited after this process began")
    return file.read_text("utf-8", "replace")


def _is_edited(name: str, file: Path) -> bool:
    """Whether the module may have been imported from another content of `file`.

    lm-eval imports the modules that tasks name again after each edit, and keeps the time.
    """
    changed = file.stat().st_mtime_ns
    module = sys.modules.get(name)
    if module is None or getattr(module, "__mtime__", None) == changed:
        return False
    return bool(changed > psutil.Process().create_time() * 1e9)


def _imported(name: str, file: Path, source: str) -> Iterator[tuple[str, Path | None]]:
    """The modules that a module of the user's own imports, and their files."""
    for node in ast.walk(ast.parse(source)):
        if function := _importer(node):
            raise UntrackedCodeError(f"{str(file)!r} uses {function}, which can run any code")
        for imported in _names(node, name):
            if imported in sys.modules:
                yield imported, _file(sys.modules[imported])
            elif (spec := _spec(imported)) is not None and spec.has_location and spec.origin:
                yield imported, Path(spec.origin)


def _importer(node: ast.AST) -> str | None:
    """The name of a function that can import any module, if `node` is one."""
    if isinstance(node, ast.Name) and node.id in BUILT_IN_IMPORTERS | IMPORTERS:
        return node.id
    return node.attr if isinstance(node, ast.Attribute) and node.attr in IMPORTERS else None


def _names(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that a statement of `module` may import, and the packages that they are in."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = getattr(sys.modules.get(module), "__package__", None)
        base = resolve_name("." * node.level + (node.module or ""), package)
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _spec(name: str) -> ModuleSpec | None:
    """None where no module has that name."""
    try:
        return find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
