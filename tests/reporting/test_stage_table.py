"""What stages cost, in words and in reports."""

from __future__ import annotations

from lrcompress.reporting.report import Report, html, markdown
from lrcompress.reporting.stage_table import memory_sentence, stage_rows, stage_sentence
from tests.samples import RECORD


def test_rows_are_in_seconds_and_mebibytes() -> None:
    moments, pivots = stage_rows(RECORD)
    assert moments.stage == "second moments"
    assert (moments.seconds, moments.cpu_seconds, moments.memory) == ("1,234.6", "2,345.7", "3,072")
    assert pivots.memory == "–"
    assert stage_rows({}) == []


def test_the_sentence_names_long_stages_only() -> None:
    stages = {"loading": 3.4, "pivots": 0.9, "gradients": 61.5}
    record = {"stages": {name: {"seconds": seconds} for name, seconds in stages.items()}}
    assert stage_sentence(record) == "Seconds: gradients 62, loading 3."
    assert stage_sentence({}) == ""


def test_reports_show_them() -> None:
    report = Report("title", (), record=RECORD)
    assert "| second moments | 1,234.6 | 2,345.7 | 3,072 |" in markdown(report)
    assert '<td>second moments</td><td data-head="seconds">1,234.6</td>' in html(report)
    assert "Where the time went" not in markdown(Report("title", (), record={}))


def test_the_peak_stands_beside_its_estimate() -> None:
    sentence = "Memory at its peak: 3.0 GiB; 3.5 GiB were estimated."
    assert memory_sentence(RECORD) == sentence
    assert memory_sentence({"memory": {"estimated": 5, "measured": None}}) == ""
    assert memory_sentence({}) == ""
