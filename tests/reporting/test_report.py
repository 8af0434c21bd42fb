"""Reports of values that others may have written: shown as text, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lrcompress.config import ScalingSettings
from lrcompress.reporting import report
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import Report
from lrcompress.workflows.scaling import report as scaling_report
from lrcompress.workflows.scaling.report import ScalingReport
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import SweepReport
from tests.conftest import invoke, refusal
from tests.samples import DETAILS, METRICS, RECORD, points, scaling_points

# absurd numbers make numpy and matplotlib warn
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_sweep_names_points_of_its_folder(tmp_path: Path) -> None:
    sweep_report.write(tmp_path, SweepReport("here", tuple(points())))
    (tmp_path / "points").mkdir()
    content = json.loads((tmp_path / "sweep.json").read_text())
    content["points"][1]["variant"] = "../../outside"
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert "is damaged" in refusal("report", tmp_path)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "NaN", "-Infinity", "1e999", "null", '"x"'])
def test_extreme_and_missing_values_of_a_report(value: str, tmp_path: Path) -> None:
    report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
    file = tmp_path / "metrics.json"
    text = file.read_text()
    assert text.count('"value": 1200') == 1
    file.write_text(text.replace('"value": 1200', f'"value": {value}'))
    result = invoke("report", tmp_path)
    assert result.exit_code == (2 if value in ("null", '"x"') else 0), result.output


ATTACK = "\"'><script>broken()</script><img src=x onerror=broken()>{{ 7 * 7 }}</svg></style>]]>"


# fields whose values the code compares, and keys that are names of models or percentages
UNCHANGED_FIELDS = ("role", "form", "sha256")
NAME_KEYS = ("dense", "low", "50", "99")


def _attacking(value: Any) -> Any:
    """`value` with the attack behind every text in it, but for UNCHANGED_FIELDS."""
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, Mapping):
        return {
            _attacking(key) if key in NAME_KEYS else key: item
            if key in UNCHANGED_FIELDS
            else _attacking(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_attacking(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = {field.name for field in fields(value)} - {*UNCHANGED_FIELDS}
        if isinstance(value, Metric):
            names -= {"name", "unit"}
        return replace(value, **{name: _attacking(getattr(value, name)) for name in names})
    return value


class _ElementParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def _pages() -> Iterator[tuple[str, str]]:
    metrics = tuple(_attacking(METRICS))
    attacked = Report(ATTACK, metrics, _attacking(DETAILS), _attacking(RECORD), (ATTACK,))
    yield "report", report.html(attacked)
    yield "sweep", sweep_report.html(SweepReport(ATTACK, tuple(_attacking(points()))))
    low = f"low{ATTACK}"
    ladder = scaling_points({"dense": 0.35, low: 0.40})
    ladder[0] = replace(ladder[0], size=ATTACK, device=ATTACK, diverged=ATTACK)
    settings = ScalingSettings(
        sizes={name: {} for name in ("a", "b", "c")}, variants={"low": {}}, resamples=50
    )
    incomplete = ScalingReport(settings, ladder, [ATTACK], metrics[:1])
    yield "scaling", scaling_report.html(incomplete)
    complete = ScalingReport(settings, ladder[1:], [], [])
    yield "scaling with pictures", scaling_report.html(complete)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(_pages())


@pytest.mark.parametrize("name", ["report", "sweep", "scaling", "scaling with pictures"])
def test_pages_hold_nothing_but_their_own_elements(name: str, pages: dict[str, str]) -> None:
    page, parser = pages[name], _ElementParser()
    parser.feed(page)
    tags = [tag for tag, _ in parser.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not [names for _, names in parser.elements if any(n.startswith("on") for n in names)]
    assert tags.count("svg") == page.count("</svg>")
    assert "broken()" in page
    assert "{{ 7 * 7 }}" in page, "the attack was read as a template"


def _projected(**projection: Any) -> Report:
    """A report of the training in RECORD, with a projection."""
    trained = {**RECORD["finetuned"], "projection": {"losses": [], "reason": None} | projection}
    return Report("title", METRICS, DETAILS, {**RECORD, "finetuned": trained})


TWICE = {"factor": 2, "tokens": 1280, "loss": 0.28, "low": 0.26, "high": 0.30}
TEN_TIMES = {"factor": 10, "tokens": 6400, "loss": 0.25, "low": 0.2, "high": 0.3}


def test_reports_show_minutes_and_the_projection() -> None:
    content = _projected(losses=[TWICE, TEN_TIMES])
    sentence = (
        "Projected held-out loss, rather too high than too low: 0.280 (0.260 to 0.300) for twice "
        "the tokens, 0.250 (0.200 to 0.300) for ten times the tokens. The 95 % intervals are of "
        "the fit alone."
    )
    markdown = report.markdown(content)
    assert f"\n\n{sentence}\n" in markdown
    assert "| minutes asked for | steps |" in markdown
    assert f'<p class="quiet">{sentence}</p>' in report.html(content)
    undone = _projected(reason=f"too short{ATTACK}")
    assert "No loss is projected for longer trainings: too short" in report.markdown(undone)
    assert "<script>broken" not in report.html(undone)
    assert "projected" not in report.markdown(Report("title", METRICS, DETAILS, RECORD))


def test_a_damaged_projection_is_refused(tmp_path: Path) -> None:
    report.write(tmp_path, _projected(losses=[TWICE]))
    file = tmp_path / "metrics.json"
    file.write_text(file.read_text().replace('"factor": 2', '"factor": "two"'))
    assert "is damaged" in refusal("report", tmp_path)


def test_reports_show_calibration_by_block(tmp_path: Path) -> None:
    content = Report("title", METRICS, DETAILS, RECORD)
    markdown, html = report.markdown(content), report.html(content)
    assert (
        "| 0 | 12.5 % | 0.0 % | 75.0 % | 2.5 |\n| 1 | 50.0 % | 99.8 % | 62.5 % | 0.8 |" in markdown
    )
    assert "<td>0</td><td>12.5 %</td><td>0.0 %</td><td>75.0 %</td><td>2.5</td>" in html
    section = html[html.index("<h2>Calibration by block: ") :]
    assert '<figure id="outliers">' in section
    assert '<figure id="probes">' in section
    report.write(tmp_path, content)
    assert report.markdown(report.read(tmp_path)) == markdown
    older = [{**linear} for linear in RECORD["linears"]]
    for linear in older:
        del linear["input_outlier_share"], linear["gradient_outlier_share"]
    unknown = Report("title", METRICS, DETAILS, {**RECORD, "linears": older, "probed": {}})
    assert "Calibration by block" not in report.markdown(unknown) + report.html(unknown)


def test_every_one_of_several_texts_has_its_short_name() -> None:
    data = [f"/home/someone/texts/with/long/names/{name}.txt" for name in ("first", "second")]
    settings = {**RECORD["finetuned"]["settings"], "data": data}
    record = {**RECORD, "finetuned": {**RECORD["finetuned"], "settings": settings}}
    content = Report("title", METRICS, record=record)
    assert "| training | low | first.txt,second.txt |" in report.markdown(content)
    assert "on first.txt, second.txt; losses" in report.markdown(content)
    html = report.html(content)
    assert "/home" not in html.replace(f'title="{data[0]}"', "").replace(
        f'title="{data[1]}"', ""
    ).replace(f"<dd>{data[0]}</dd>", "").replace(f"<dd>{data[1]}</dd>", "")
    made = [replace(point, text=f"8 x 64 tokens of {','.join(data)}") for point in points()]
    swept = SweepReport("model", tuple(made))
    assert "Calibrated on 8 x 64 tokens of first.txt,second.txt. " in sweep_report.markdown(swept)
    page = sweep_report.html(swept)
    for path in data:
        assert f'<span class="short" title="{path}">{path.rpartition("/")[2]}</span>' in page


LONG = "low /home/someone/models/with/long/names/keep-0.6"


def test_sections_on_one_model_name_it(tmp_path: Path) -> None:
    metrics = tuple(replace(m, model=LONG) if m.model == "low" else m for m in METRICS)
    content = Report("title", metrics, record=RECORD)
    markdown, html = report.markdown(content), report.html(content)
    short = content.names.shorten(LONG)
    named = f'<span class="short" title="{LONG}">{short.replace("/", "/<wbr>")}</span>'
    for section in ("Where the time went", "Ranks", "Calibration by block", "Training"):
        assert f"\n## {section}: {short}\n" in markdown
        assert f"<h2>{section}: {named}</h2>" in html
    assert f"| training | {short} | train.txt |" in markdown
    assert "| evaluation | all | t.txt |" in markdown
    assert f'<td>training</td><td class="words" data-head="model">{named}</td>' in html
    report.write(tmp_path, content)
    assert report.markdown(report.read(tmp_path)) == markdown
    older = json.loads((tmp_path / "metrics.json").read_text())
    del older["record_of"]
    for text in older["texts"]:
        del text["model"]
    (tmp_path / "metrics.json").write_text(json.dumps(older))
    assert report.markdown(report.read(tmp_path)) == markdown


@pytest.mark.parametrize("share", ["1.5", "-0.25", '"most"', '"NaN"'])
def test_a_share_that_is_none_is_refused(share: str, tmp_path: Path) -> None:
    report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
    file = tmp_path / "metrics.json"
    text = file.read_text()
    assert text.count('"input_outlier_share": 0.998') == 1
    file.write_text(text.replace('"input_outlier_share": 0.998', f'"input_outlier_share": {share}'))
    assert "is damaged" in refusal("report", tmp_path)
