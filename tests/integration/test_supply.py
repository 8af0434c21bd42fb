"""What is installed: every dependency has both bounds, and the oldest are those that are tested."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
EVERY = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
BOUNDS = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+),<([\d.]+)")


def pinned(file: str) -> dict[str, str]:
    lines = Path(file).read_text("utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and line[0] != "#")


@pytest.mark.parametrize("dependency", EVERY)
def test_every_dependency_is_bounded(dependency: str) -> None:
    found = BOUNDS.fullmatch(dependency)
    assert found, "write NAME>=OLDEST,<NEXT"
    low, high = (tuple(map(int, found[n].split("."))) for n in (2, 3))
    assert low < high
    own = tuple(map(int, pinned("constraints.txt")[found[1].lower()].split(".")[:3]))
    assert low <= own < high


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """Of all that users install; what development needs besides is as new as it comes."""
    extras = [one for name, extra in EXTRAS.items() if name != "dev" for one in extra]
    bounds = [BOUNDS.fullmatch(one) for one in (*PROJECT["dependencies"], *extras)]
    oldest = {found[1].lower(): found[2] for found in bounds if found}
    assert pinned("constraints-oldest.txt") == oldest


def test_what_is_imported_is_declared() -> None:
    """Of every package that lrcompress imports, in lower case and with the name of its project."""
    names = {"yaml": "pyyaml", "lm_eval": "lm-eval", "typing_extensions": "typing-extensions"}
    declared = {re.split(r"[\[>]", one)[0].lower() for one in EVERY}
    outside = set(_imported()) - set(sys.stdlib_module_names) - {"lrcompress", "pydoc_data"}
    assert {names.get(name, name) for name in outside} <= declared


def _imported() -> Iterator[str]:
    for file in Path("lrcompress").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)


FOUND = {
    "good": {"name": "a", "version": "1", "vulns": []},
    "weak": {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]},
    "unknown": {"name": "c", "skip_reason": "not found"},
}


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (("good",), 0, "1 of 1 versions looked up, 0 with weaknesses"),
        (("good", "weak", "unknown"), 1, "b 2 has CVE-1, mended in 3"),
        (("good", "unknown"), 2, "no database at hand knows c"),
        ((), 2, "nothing could be looked up"),
    ],
)
def test_the_audit_says_what_it_found_and_what_it_could_not(
    names: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    stand_in = tmp_path / "pip-audit"
    found = json.dumps({"dependencies": [FOUND[name] for name in names]}) if names else ""
    (tmp_path / "found.json").write_text(found)
    stand_in.write_text(f"#!/bin/sh\ncat {tmp_path / 'found.json'}\n")
    stand_in.chmod(0o755)
    done = subprocess.run(
        [sys.executable, ".ci/audit.py", "constraints.txt"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    assert words in done.stdout
