"""Results that are kept until their inputs or the code of their stages change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lrcompress.checkpoint import fingerprints
from lrcompress.workflows.work_folder import ResultFile
from tests.conftest import invoke, small_recipe


def number(value: int) -> Callable[[], list[int]]:
    return lambda: [value]


def not_again() -> list[int]:
    raise AssertionError("a kept result was made again")


@pytest.fixture
def file(tmp_path: Path) -> ResultFile[list[int]]:
    return ResultFile(tmp_path / "results" / "one.json", "numbers", list[int])


def test_a_result_is_made_once_for_equal_inputs(file: ResultFile[list[int]]) -> None:
    assert file.read("inputs", ["evaluate"]) is None
    assert file.cached("inputs", ["evaluate"], number(1)) == [1]
    assert file.cached("inputs", ["evaluate"], not_again) == [1]
    assert file.cached("other inputs", ["evaluate"], number(2)) == [2]
    assert file.read("inputs", ["evaluate"]) is None
    assert file.stored() == [2]


def test_an_empty_result_is_kept_too(file: ResultFile[list[int]]) -> None:
    assert file.cached("inputs", ["evaluate"], list) == []
    assert file.cached("inputs", ["evaluate"], not_again) == []


@pytest.mark.parametrize("damaged", ["{", '{"numbers": [1]}', '{"inputs": "%s", "numbers": "x"}'])
def test_a_damaged_result_is_made_again(file: ResultFile[list[int]], damaged: str) -> None:
    file.cached("inputs", ["evaluate"], number(1))
    digest = json.loads(file.path.read_text())["inputs"]
    file.path.write_text(damaged.replace("%s", digest))
    assert file.cached("inputs", ["evaluate"], number(2)) == [2]


def test_a_stage_with_a_new_number_makes_its_results_stale(
    file: ResultFile[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.cached("inputs", ["evaluate", "benchmark"], number(1))
    monkeypatch.setitem(fingerprints.STAGES, "factorize", 1000)
    assert file.cached("inputs", ["evaluate", "benchmark"], not_again) == [1]
    monkeypatch.setitem(fingerprints.STAGES, "benchmark", 1000)
    assert file.cached("inputs", ["evaluate", "benchmark"], number(2)) == [2]


def test_a_folder_that_cannot_be_made_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, tmp_path / "text.txt")
    for command in ("run", "sweep"):
        result = invoke(command, recipe, tmp_path / "file" / "out")
        assert result.exit_code == 2
        assert "is not a folder to write to" in result.stderr
