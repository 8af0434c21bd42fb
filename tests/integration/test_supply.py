"""Dependencies: each has a lower and an upper bound, and the tests run on the lower bounds."""

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
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(requirement for extra in EXTRAS.values() for requirement in extra),
]
BOUNDS = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+),<([\d.]+)")


def pinned(file: str) -> dict[str, str]:
    lines = Path(file).read_text("utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and line[0] != "#")


@pytest.mark.parametrize("dependency", REQUIREMENTS)
def test_every_dependency_is_bounded(dependency: str) -> None:
    match = BOUNDS.fullmatch(dependency)
    assert match, "write NAME>=OLDEST,<NEXT"
    low, high = (tuple(map(int, match[group].split("."))) for group in (2, 3))
    assert low < high
    installed = tuple(map(int, pinned("constraints.txt")[match[1].lower()].split(".")[:3]))
    assert low <= installed < high


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """Of everything that users install; the packages of the extra `dev` are the newest ones."""
    extras = [item for name, extra in EXTRAS.items() if name != "dev" for item in extra]
    matches = [BOUNDS.fullmatch(item) for item in (*PROJECT["dependencies"], *extras)]
    oldest = {match[1].lower(): match[2] for match in matches if match}
    assert pinned("constraints-oldest.txt") == oldest


def test_what_is_imported_is_declared() -> None:
    """Of every package that lrcompress imports, in lower case and with the name of its project."""
    names = {"yaml": "pyyaml", "lm_eval": "lm-eval", "typing_extensions": "typing-extensions"}
    declared = {re.split(r"[\[>]", item)[0].lower() for item in REQUIREMENTS}
    outside = set(_imported()) - set(sys.stdlib_module_names) - {"lrcompress", "pydoc_data"}
    assert {names.get(name, name) for name in outside} <= declared


def _imported() -> Iterator[str]:
    for file in Path("lrcompress").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").partition(".")[0]
            elif isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)


ENTRIES = {
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
    answer = json.dumps({"dependencies": [ENTRIES[name] for name in names]}) if names else ""
    (tmp_path / "answer.json").write_text(answer)
    stand_in.write_text(f"#!/bin/sh\ncat {tmp_path / 'answer.json'}\n")
    stand_in.chmod(0o755)
    audit = subprocess.run(
        [sys.executable, ".ci/audit.py", "constraints.txt"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (audit.returncode, audit.stderr) == (code, "")
    assert words in audit.stdout
