"""The report of a benchmark: the table on the terminal, and a folder that is not overwritten."""

from __future__ import annotations

from pathlib import Path

from tests.benchmark.conftest import QUICK
from tests.conftest import invoke


def test_table_and_files(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    command = ("bench", "ffn", *QUICK, "--tokens", 1, "--dtype", "float32", "--form", "narrowed")
    result = invoke(*command, "--out", out)
    assert result.exit_code == 0, result.output
    assert "of ideal" in result.stdout
    assert "narrowed 0.5" in result.stdout
    assert "peak" not in result.stdout
    again = invoke(*command, "--out", out)
    assert again.exit_code == 2
    assert "exists" in again.output
