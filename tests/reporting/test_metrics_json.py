"""The JSON files fit the published schemas, whatever was measured."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as SchemaError

from lrcompress.checkpoint.record import write_measured, write_record
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.reporting import metrics_json, report
from lrcompress.reporting.differences import BlockChange, Differences, PositionLoss, TokenChange
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.non_inferiority import EVERY, non_inferiority_failures
from lrcompress.reporting.report import Report
from lrcompress.reporting.significance import comparisons
from lrcompress.runtime.errors import InputError
from lrcompress.workflows import schemas
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep import sweep_json
from lrcompress.workflows.sweep.point import SweepPoint
from lrcompress.workflows.sweep.report import SweepReport
from tests import samples

NAN, INF = math.nan, math.inf


def strict(text: str) -> Any:
    """Reads standard JSON: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def hopeless() -> Report:
    """A report of a broken model, with NaN and infinity wherever a number can be."""
    metrics = [
        Metric("dense", "parameters", 1000, "", False),
        Metric("dense", "task acc", 0.5, "", True, {"samples": 8}, 0.4, 0.6, [[1, 1], [0, 1]] * 4),
        Metric("broken", "parameters", 800, "", False),
        Metric("broken", "task acc", NAN, "", True, {"samples": 8}, NAN, NAN, [[NAN, 1]] * 8),
        Metric("broken", "task word_perplexity", INF, "", False, {"floor": -INF}),
    ]
    positions = (PositionLoss(1, 15, 15, 2.0, INF), PositionLoss(16, 31, 16, 2.0, NAN))
    change = ("dense", "broken", "text")
    tokens = TokenChange(*change, 32, 1, 31, NAN, {"50": INF}, 0.0, positions, ())
    details = Differences((tokens,), (BlockChange(*change, 31, (0.1, NAN, 0.3)),))
    return Report("broken", tuple(metrics), details)


def test_the_published_schemas_are_those_of_the_code() -> None:
    """`make schemas` writes them again."""
    for name, text in schemas.schemas().items():
        assert (Path("docs") / name).read_text("utf-8") == text


def test_what_is_written_fits_the_published_schemas() -> None:
    evaluated = Report("title", samples.METRICS, samples.DETAILS, samples.RECORD)
    swept = SweepReport("model", tuple(samples.points()))
    written = {
        "metrics.schema.json": report.to_json(evaluated),
        "sweep.schema.json": sweep_report.to_json(swept),
    }
    for name, text in written.items():
        schema, content = json.loads(schemas.schemas()[name]), strict(text)
        Draft202012Validator(schema).validate(content)
        with pytest.raises(SchemaError, match="1 was expected"):
            Draft202012Validator(schema).validate(content | {"version": 2})


@pytest.mark.parametrize("name", ["metrics.schema.json", "sweep.schema.json"])
def test_every_kind_of_thing_is_described(name: str) -> None:
    schema = strict(schemas.schemas()[name])
    for kind in (schema, *schema["$defs"].values()):
        assert kind["description"]
        assert kind["required"] == list(kind["properties"])
    assert "NaN" in schema["description"]
    summary = schema["$defs"]["Summary"]["properties"]
    assert summary["low"]["description"].startswith("The slowest run of a speed")
    assert "samples" not in summary


def test_numbers_that_are_not_finite_are_texts_and_are_read_again(tmp_path: Path) -> None:
    report.write(tmp_path, hopeless())
    text = (tmp_path / "metrics.json").read_text()
    content = strict(text)
    assert [metric["value"] for metric in content["metrics"][-2:]] == ["NaN", "Infinity"]
    assert content["metrics"][-1]["conditions"] == {"floor": "-Infinity"}
    assert content["metrics"][0]["low"] is None
    again = report.read(tmp_path)
    assert math.isnan(again.metrics[3].value)
    assert again.metrics[4].value == INF
    assert again.details.tokens[0].positions[0].model == INF
    assert report.to_json(again) == text


def test_no_format_stumbles_over_them(tmp_path: Path) -> None:
    report.write(tmp_path, hopeless())
    row = "| task acc | 0.5 (0.4–0.6) | NaN | – | higher |"
    assert row in (tmp_path / "report.md").read_text()
    assert "changed most in block 1, by nan" in (tmp_path / "report.html").read_text()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        values = [line["value"] for line in csv.DictReader(file)]
    assert values == ["1000", "0.5", "800", "NaN", "Infinity"]


def test_they_are_compared_with_nothing() -> None:
    metrics = hopeless().metrics
    assert comparisons(metrics) == ()
    names = ("dense", "broken")
    losses = [Metric(name, "loss", 1.0, "", False, samples=[[1, 1]] * 8) for name in names]
    with pytest.raises(InputError, match="'task acc' of 'broken' is NaN, which shows nothing"):
        non_inferiority_failures([losses[0], metrics[1], losses[1], metrics[3]], {EVERY: 0.1})


def test_a_sweep_with_them_has_its_report(tmp_path: Path) -> None:
    metrics = hopeless().metrics
    dense, broken = (tuple(m for m in metrics if m.model == name) for name in ("dense", "broken"))
    points = [
        SweepPoint("dense", 1.0, 1.0, 0.0, None, "", dense),
        SweepPoint("svd", 0.8, 0.8, 1.0, None, "", broken),
    ]
    sweep_report.write(tmp_path, SweepReport("model", tuple(points)))
    sweep = metrics_json.read(sweep_json.Sweep, tmp_path / "sweep.json")
    assert math.isnan(sweep.points[1].metrics[1].value)
    assert strict((tmp_path / "sweep.json").read_text())["fronts"][0]["left_out"] == ["svd at 0.8"]
    for name in ("sweep.md", "sweep.html"):
        assert "task acc of broken is NaN: it shows nothing" in (tmp_path / name).read_text()
    assert metrics_json.to_json(sweep) == (tmp_path / "sweep.json").read_text()


def test_records_cards_and_logs_are_valid_json_too(tmp_path: Path) -> None:
    row = "| task word_perplexity | – | Infinity | – | lower |"
    write_record(tmp_path, {"source": "model"})
    write_measured(tmp_path, hopeless().metrics, ())
    record = strict((tmp_path / "lrcompress.json").read_text())
    assert record["metrics"][-1]["value"] == "Infinity"
    assert row in (tmp_path / "README.md").read_text()
    write_record(tmp_path, record)  # as an export passes it on
    assert row in (tmp_path / "README.md").read_text()
    sample_logs.write(tmp_path / "logs", {"task": [{"resps": [[-INF, False]]}]})
    assert strict((tmp_path / "logs" / "task.jsonl").read_text()) == {
        "resps": [["-Infinity", False]]
    }


def test_damaged_metrics_of_a_record_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    write_record(tmp_path, {"source": "model"})
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"lrcompress\.json' are damaged"):
        write_record(tmp_path, {"metrics": [{"model": "dense"}]})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before
