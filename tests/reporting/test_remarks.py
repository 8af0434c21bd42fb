"""What the numbers themselves demand to be said, in every format."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from lrcompress.reporting import report
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.non_inferiority import EVERY, non_inferiority_failures
from lrcompress.reporting.remarks import remarks
from lrcompress.reporting.report import Report
from lrcompress.runtime.errors import InputError
from tests.samples import METRICS

NAN = Metric("low", "task acc", math.nan, "", True, {"samples": 4}, math.nan, math.nan)
SENTENCE = "task acc of low is NaN: it shows nothing, and is not compared"


def _cut(name: str, cut: int, length: int = 512) -> Metric:
    conditions = {"samples": 10, "context_length": length, "prompts_cut": cut}
    return Metric("low", name, 0.5, "", True, conditions)


def test_ordinary_numbers_need_no_remark() -> None:
    assert remarks(METRICS) == ()


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_numbers_that_are_not_finite_are_named(value: float, text: str) -> None:
    metric = Metric("low", "task acc", value, "", True)
    assert remarks([metric]) == (SENTENCE.replace("NaN", text),)


def test_cut_prompts_are_one_sentence_for_each_length() -> None:
    metrics = [
        _cut("my task acc", 1), _cut("my task acc_norm", 1), _cut("gsm exact (strict-match)", 3),
        _cut("other acc", 2, 128),
    ]  # fmt: skip
    conditions = {"context_length": 512, "prompts_cut": 4}
    group = Metric("low", "group acc", 0.5, "", True, conditions, parts=["my task acc"])
    start = "prompts longer than the context of {} tokens, with room for the answer, lost their "
    assert remarks([*metrics, group]) == (
        start.format(512) + "beginning: 1 of 10 in my task, 3 of 10 in gsm",
        start.format(128) + "beginning: 2 of 10 in other",
    )


def test_fewer_resamples_than_lm_evals_are_one_sentence() -> None:
    metrics = [
        Metric(model, f"{task} f1", 0.5, "", True, {"bootstrap_resamples": count})
        for model in ("dense", "low")
        for task, count in (("mrpc", 10_000), ("cola", 10_000), ("qqp", 2000))
    ]
    end = " bootstrap resamples, and may be off by {}: lm-eval draws more, which takes long"
    assert remarks(metrics) == (
        "the standard error of mrpc f1, cola f1 is of 10,000" + end.format("0.7%"),
        "the standard error of qqp f1 is of 2,000" + end.format("1.6%"),
    )


def test_every_format_marks_them_and_reading_does_not_double_them(tmp_path: Path) -> None:
    report.write(tmp_path, Report("t", (*METRICS, NAN), notes=("a note",)))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert text.count(SENTENCE) == 1
        assert "nan (nan" not in text
    assert json.loads((tmp_path / "metrics.json").read_text())["notes"] == ["a note", SENTENCE]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["metric"] == "task acc")
    assert (row["value"], row["low"], row["high"]) == ("NaN", "NaN", "NaN")
    again = report.read(tmp_path)
    assert again.notes == ("a note",)
    assert again.sentences == ("a note", SENTENCE)


def test_max_loss_names_them_also_where_nothing_is_compared() -> None:
    size = Metric("dense", "parameters", 1, "", False)
    with pytest.raises(InputError, match="'task acc' of 'low' is NaN, which shows nothing"):
        non_inferiority_failures([size, NAN], {EVERY: 0.1})
    with pytest.raises(InputError, match="'task acc' of 'low' is NaN"):
        non_inferiority_failures([NAN, *METRICS], {EVERY: 0.1})  # of the first model
