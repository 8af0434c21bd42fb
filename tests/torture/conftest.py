"""What the tests that try to break things share: how often they try, what they count, folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

Times = Callable[[int, int], int]
Tally = Callable[[str, int], None]


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Times:
    """times(full, sample): how often to try: `full` with --full, `sample` otherwise."""
    full = bool(request.config.getoption("full"))
    return lambda whole, sample: whole if full else sample


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """tally(what, count) adds to the counts that the summary prints; from every process."""
    return lambda what, count: record_property(f"torture: {what}", count)


@dataclass(frozen=True)
class Workspace:
    """The folder of inputs, which commands must not change, and the folder that they write to."""

    inputs: Path
    work: Path

    @property
    def out(self) -> Path:
        return self.work / "out"


@pytest.fixture
def workspace(tmp_path: Path, dense: Path, factorized: Path) -> Workspace:
    """Inputs dense/, low/ and text.txt, and an empty work folder."""
    folders = Workspace(tmp_path / "inputs", tmp_path / "work")
    shutil.copytree(dense, folders.inputs / "dense")
    shutil.copytree(factorized, folders.inputs / "low")
    text = folders.inputs / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200, "utf-8")
    folders.work.mkdir()
    return folders
