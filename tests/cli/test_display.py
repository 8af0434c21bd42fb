"""Sentences of the terminal name the model that they are about."""

from __future__ import annotations

import numpy as np
import pytest

from lrcompress.cli.display import show_verdict
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.non_inferiority import EVERY, non_inferiority_failures
from tests.reporting.test_significance import items, windows

RIGHT = np.array([1] * 70 + [0] * 30)
LOSSES = np.random.default_rng(6).normal(3, 0.5, 60)


def sentences(metrics: list[Metric], capsys: pytest.CaptureFixture[str]) -> list[str]:
    limits = {EVERY: 0.01}
    show_verdict(metrics, non_inferiority_failures(metrics, limits), limits)
    return capsys.readouterr().out.splitlines()


def test_a_verdict_names_both_models_and_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    lost = [items("dense", RIGHT), items("small", RIGHT[::-1])]
    row, verdict = sentences(lost, capsys)
    assert row.startswith("piqa acc: small may have lost ")
    assert row.endswith("%, by the 95 % interval of this row alone.")
    assert verdict == (
        "FAIL: it is not shown that small lost at most 1 % in every metric compared, against dense."
    )


def test_why_another_interval_stands_above(capsys: pytest.CaptureFixture[str]) -> None:
    first = [items("dense", RIGHT), windows("dense", LOSSES)]
    two = [*first, items("small", RIGHT[::-1]), windows("small", LOSSES[::-1])]
    explained = "(the interval above has 97.5 %: it is adjusted for all rows)."
    lines = [line for line in sentences(two, capsys) if line.startswith("piqa acc: small")]
    assert [line.endswith(explained) for line in lines] == [True]


def test_too_few_samples_are_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    alone = [windows("dense", LOSSES[:2]), windows("small", LOSSES[:2])]
    row, _ = sentences(alone, capsys)
    assert row == "token perplexity, x: small has 2 windows or items, and 6 are needed."
