"""Tasks are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.runtime.errors import InputError
from tests.evaluation.tasks.conftest import ROWS, write_rows


def test_a_task_is_named_once(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a" / "same.jsonl", ROWS)
    second = write_rows(tmp_path / "b" / "same.jsonl", ROWS)
    with pytest.raises(InputError, match=r"task 'same' is given twice, as .*a/same.* and .*b/same"):
        resolve([str(first), str(second)])
    assert list(resolve([str(first), str(first)]).tasks) == ["same"]
