"""The report pages in a real browser: what they show, sort and print; they load nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lrcompress.reporting import evaluation_figures, report
from lrcompress.reporting.report import Report
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import SweepReport
from tests.large_samples import TEXTS, checkpoints, grouped_tasks, sweep
from tests.samples import DETAILS, METRICS, RECORD, SCRIPT, points

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        assert not os.environ.get("CI"), "CI has to install chromium"
        pytest.skip("needs chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    content = Report(f"{SCRIPT} & report", METRICS, DETAILS, RECORD)
    (folder / "report.html").write_text(report.html(content), "utf-8")
    swept = SweepReport(SCRIPT, tuple(points()))
    (folder / "sweep.html").write_text(sweep_report.html(swept), "utf-8")
    (folder / "checkpoints.html").write_text(report.html(checkpoints()), "utf-8")
    (folder / "groups.html").write_text(report.html(grouped_tasks()), "utf-8")
    (folder / "large-sweep.html").write_text(sweep_report.html(sweep()), "utf-8")
    return {file.stem: file for file in folder.iterdir()}


@pytest.fixture(params=["report", "sweep"])
def page(
    request: pytest.FixtureRequest, browser: Browser, pages: dict[str, Path]
) -> Iterator[Page]:
    """A page; the test fails for any console message, error or request."""
    context = browser.new_context()
    page, messages = context.new_page(), list[str]()
    file = f"file://{pages[request.param]}"
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url))
    page.goto(file)
    yield page
    context.close()
    assert [text for text in messages if text != file and not text.startswith("data:")] == []


def test_what_comes_from_outside_is_text(page: Page) -> None:
    assert page.evaluate("window.broken") is None
    assert SCRIPT in page.inner_text("h1")
    assert page.locator("script").count() == 1


def test_every_figure_has_words_and_a_size(page: Page) -> None:
    figures = page.locator("figure .broad svg")
    assert figures.count() >= 1
    for figure in figures.all():
        assert figure.get_attribute("role") == "img"
        assert len(figure.get_attribute("aria-label") or "") > 30
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 500
        assert box["height"] > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_figures_is_read_on_the_page(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    colour = "el => getComputedStyle(el).fill"
    text = page.locator("figure svg text").first.evaluate(colour)
    body = page.locator("h1").evaluate("el => getComputedStyle(el).color")
    assert text == body
    assert body == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")


ALL = ["report", "sweep", "checkpoints", "groups", "large-sweep"]
LARGE = ["checkpoints", "groups", "large-sweep"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# of every element that it is called on: whether it can be seen within the width of the window
IN_VIEW = """elements => elements.filter(e => e.checkVisibility())
  .map(e => e.getBoundingClientRect())
  .every(box => box.left >= 0 && box.right <= innerWidth)"""


@pytest.mark.parametrize("page", ALL, indirect=True)
def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("figure > div, .cards td, h1, p").evaluate_all(IN_VIEW)


@pytest.mark.parametrize("page", ALL, indirect=True)
def test_figures_can_be_read_on_a_phone(page: Page) -> None:
    """They take the whole width, and their type is not smaller than 12 pixels."""
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    shrunk = (
        """all => all.map(svg => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
    )
    svgs = page.locator("figure .narrow svg")
    assert all(10.5 * scale >= 12 for scale in svgs.evaluate_all(shrunk))
    assert svgs.evaluate_all(IN_VIEW)
    assert not page.locator("figure .broad").first.is_visible()


@pytest.mark.parametrize("page", LARGE, indirect=True)
def test_every_number_stands_beside_its_name_on_a_phone(page: Page) -> None:
    """On cards beside what heads the column; in other tables the first column stays where it is."""
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for cell in page.locator(".cards:not(.flowing)").first.locator("td[data-head]").all()[:20]:
        head = cell.get_attribute("data-head")
        assert cell.evaluate("e => getComputedStyle(e, '::before').content") == f'"{head}"'
    page.evaluate("document.querySelectorAll('.wide').forEach(e => { e.scrollLeft = 9999 })")
    assert page.locator("tbody td:first-child").evaluate_all(IN_VIEW)


@pytest.mark.parametrize("page", LARGE, indirect=True)
def test_numbers_are_in_view_on_a_desktop(page: Page) -> None:
    page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
    assert page.locator("td, th").evaluate_all(IN_VIEW)


@pytest.mark.parametrize("page", ["checkpoints"], indirect=True)
def test_paths_are_short_and_told_by_hovering_and_in_a_legend(page: Page) -> None:
    heads = page.locator("table").first.locator("th")
    assert heads.nth(2).inner_text().strip() == "factorized keep-0.9/…/model"
    assert (heads.nth(2).locator("span").get_attribute("title") or "").startswith(
        "factorized /home"
    )
    assert "/home" not in page.inner_text("body")
    page.get_by_text("Paths of the short names").click()
    assert TEXTS[1] in page.locator("details dd").all_inner_texts()


@pytest.mark.parametrize("page", ["groups"], indirect=True)
def test_parts_of_a_group_are_folded(page: Page) -> None:
    rows = page.locator("tbody tr:visible td:first-child")
    assert rows.all_inner_texts()[:4] == [
        "parameters ↓", "arc_easy acc ↑", "piqa acc ↑", "mmlu acc ↑",
    ]  # fmt: skip
    assert not [text for text in rows.all_inner_texts() if text.startswith("mmlu_")]
    assert page.locator("figure:visible").count() == 1
    page.get_by_text("mmlu: its 61 parts").click()
    assert page.locator("details tbody tr:visible").count() == 61 + 2 * 61
    assert page.locator("#tasks-mmlu").is_visible()


@pytest.mark.parametrize("page", ["groups"], indirect=True)
def test_heads_that_sort_look_like_it(page: Page) -> None:
    for button in page.locator("thead button").all()[:4]:
        assert "↕" in button.evaluate("e => getComputedStyle(e, '::after').content")
        assert button.evaluate("e => getComputedStyle(e).cursor") == "pointer"


@pytest.mark.parametrize("page", ["groups", "large-sweep"], indirect=True)
def test_verdicts_are_whole_on_a_phone(page: Page) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    verdicts = page.locator("h2:has-text('Is the difference real?') + .wide td:nth-child(3)")
    assert verdicts.count() > 5
    assert verdicts.evaluate_all(IN_VIEW)
    assert verdicts.evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth)")


def test_prints(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.wide')).overflowX") == "visible"
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("page", ["sweep"], indirect=True)
def test_tables_sort_by_number_and_back(page: Page) -> None:
    table = page.locator("table").first
    names, sizes = (table.locator(f"tbody td:nth-child({n})") for n in (1, 3))
    assert sizes.all_inner_texts() == ["1,200", "1,000", "1,100", "700"]
    button = table.locator("th:nth-child(3) button")
    button.click()
    assert sizes.all_inner_texts() == ["700", "1,000", "1,100", "1,200"]
    assert names.first.inner_text() == "small at 0.5"
    assert table.locator("th:nth-child(3)").get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert sizes.all_inner_texts() == ["1,200", "1,100", "1,000", "700"]
    table.locator("th:nth-child(1) button").click()
    assert names.all_inner_texts() == ["dense", "large at 0.9", "small at 0.5", "small at 0.8"]
    assert table.locator("th[aria-sort]").count() == 1


@pytest.mark.parametrize("page", ["report"], indirect=True)
def test_the_report_shows_all_that_was_found(page: Page) -> None:
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "Is the difference real?", "Token by token", "Block by block", "Refinement: low",
        "Continuations", "How it was measured", "Texts", "Training: low",
        "Where the time went: low", "Ranks: low", "Calibration by block: low",
    ]  # fmt: skip
    drawn = evaluation_figures.pictures(METRICS, DETAILS, RECORD)
    assert page.locator("figure").count() == len(list(drawn))
    first = page.locator("table").first
    assert first.locator("tbody tr").nth(1).inner_text().split("\t") == [
        "token perplexity, t.txt ↓", "7.389", "12.18 1.65x",
    ]  # fmt: skip
