"""Versions of installed packages, and checks for optional ones."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path

from lrcompress.runtime.errors import InputError


def versions() -> dict[str, str]:
    """Package -> version of the software that results depend on.

    Python is one of them, because the `pydoc` texts come from it.
    """
    packages = ("lrcompress", "lm-eval", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def require_extra(package: str, extra: str) -> None:
    """Raises InputError if `package`, of the optional dependencies `extra`, is not installed."""
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
