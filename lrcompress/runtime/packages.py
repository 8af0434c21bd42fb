"""Installed packages: versions that decide results, and optional ones that a command needs."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path

from lrcompress.runtime.errors import InputError


def versions() -> dict[str, str]:
    """Of the software that decides results; Python's, because `pydoc` texts are its own."""
    packages = ("lrcompress", "lm-eval", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def require_extra(package: str, extra: str) -> None:
    """Raises InputError where a package of the optional dependencies `extra` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{extra} needs {package}: pip install 'lrcompress[{extra}]'")


def package_folder(name: str) -> Path | None:
    """The folder of an installed Python package; None where no package has that name."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])
