"""Continuations of prompts by several models."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.evaluation.continuations import continuations
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.evaluation.conftest import loaded


def test_continuations_are_the_likeliest_tokens(trained: Path, dense: Path) -> None:
    models = loaded(trained, dense)
    (continuation,) = continuations(models, ["The quick brown "], 12)
    assert continuation.texts["0"].startswith("fox jumps")
    assert continuation.texts["1"] != continuation.texts["0"]
    with pytest.raises(InputError, match="positions of the model"):
        continuations(models, ["word " * 200], 12)
    with pytest.raises(InputError, match="at least one"):
        continuations(models, [""], 12)


def test_prompts_reach_terminal_and_report(trained: Path, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", dense, "--baseline", trained, "--perplexity", "", "--no-speed", "--out", out,
        "--prompt", "The quick, brown ", "--continuation-tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "'The quick, brown '" in result.output
    for page in ("report.md", "report.html"):
        assert "Continuations" in (out / page).read_text()
