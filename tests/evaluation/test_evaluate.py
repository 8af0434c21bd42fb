"""Evaluations as the command `eval` makes them: JSON, CSV and refused prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.evaluation import evaluate
from tests.conftest import invoke


def test_json_alone_is_printed_and_csv_has_every_metric(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", dense, "--perplexity", text, "--context-length", "64", "--limit", "2", "--out", out,
        "--prompt-length", "8", "--new-tokens", "2", "--repeats", "2", "--json",
    )  # fmt: skip
    content = json.loads(result.stdout)
    assert content == json.loads((out / "metrics.json").read_text())
    rows = (out / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + len(content["metrics"])
    assert rows[0].startswith("model,metric,value")


def test_json_stays_json_beside_a_verdict(dense: Path, factorized: Path, text: Path) -> None:
    result = invoke(
        "eval", factorized, "--baseline", dense, "--perplexity", text, "--context-length", "64",
        "--limit", "8", "--no-speed", "--json", "--max-loss", "0.0001%",
    )  # fmt: skip
    assert result.exit_code == 3
    assert json.loads(result.stdout)["comparisons"]
    assert "FAIL" in result.stderr


def test_an_unfit_prompt_is_refused_before_anything_is_measured(
    dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "quality", lambda *_: pytest.fail("measured"))
    result = invoke("eval", dense, "--perplexity", text, "--prompt", "word " * 200)
    assert result.exit_code == 2
    assert "positions of the model" in result.stderr
