"""Pictures: which are drawn, their text alternatives, and that equal numbers give equal files."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from lrcompress.reporting import evaluation_figures, figures
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.figures import Picture
from lrcompress.workflows.sweep import figures as sweep_figures
from lrcompress.workflows.sweep.pareto import fronts
from tests.large_samples import checkpoints, grouped_tasks
from tests.samples import DETAILS, METRICS, RECORD, SCRIPT, points


@cache
def drawn() -> dict[str, Picture]:
    return {p.name: p for p in evaluation_figures.pictures(METRICS, DETAILS, RECORD)}


def test_every_kind_of_number_has_its_picture() -> None:
    pictures = drawn()
    assert list(pictures) == [
        "tasks", "positions", "blocks", "refined", "ranks", "spectra", "outliers", "probes",
        "training",
    ]  # fmt: skip
    assert {p.section for p in pictures.values()} == {
        "metrics", "tokens", "blocks", "refinement", "ranks", "calibration", "training",
    }  # fmt: skip
    assert not list(evaluation_figures.pictures(METRICS[:1], Differences(), {}))


def test_the_words_have_the_numbers() -> None:
    pictures = drawn()
    assert "q acc: dense 0.600, low 0.500" in pictures["tasks"].text
    assert "low 2x after few tokens, 1.5x after many" in pictures["positions"].text
    assert "low: most in block 1, 0.5" in pictures["blocks"].text
    assert "lower after it in 1 of 2 blocks" in pictures["refined"].text
    assert "ranks 2 to 6; energy kept 0.7000 to 1.0000" in pictures["ranks"].text
    assert pictures["outliers"].text == (
        "Outlier tokens in calibration: their share of the energy, by block. inputs of gate and "
        "up: at most 50.0%, in block 1; inputs of down: at most 99.8%, in block 1; gradients of "
        "outputs: at most 75.0%, in block 0."
    )
    assert "by block: from 0.8 in block 1 to 2.5 in block 0" in pictures["probes"].text
    assert "from 0.5000 to 0.3000, the best at step 10" in pictures["training"].text


def test_svg_is_an_element_in_the_colour_of_its_page() -> None:
    for picture in drawn().values():
        assert picture.svg.startswith("<svg role=")
        assert "currentColor" in picture.svg
        assert figures.INK not in picture.svg
        assert "http" not in picture.svg
        root = ElementTree.fromstring(picture.file)
        assert root.attrib["aria-label"] == picture.text
        assert Image.open(io.BytesIO(picture.png)).width > 800


def test_names_from_outside_are_text_and_no_formulas() -> None:
    scores = [metric for metric in METRICS if metric.low is not None]
    named = [replace(score, name=f"{SCRIPT} $x$") for score in scores]
    (picture,) = evaluation_figures.pictures(named, Differences(), {})
    assert SCRIPT not in picture.svg
    assert "&lt;script&gt;" in picture.svg
    assert "$x$" in picture.svg


def test_equal_numbers_give_equal_files() -> None:
    again = evaluation_figures.pictures(METRICS, DETAILS, {"refined": RECORD["refined"]})
    for picture in again:
        assert picture == drawn()[picture.name]


def test_files_take_the_place_of_older_ones(tmp_path: Path) -> None:
    pictures = list(drawn().values())
    figures.write(tmp_path, pictures)
    figures.write(tmp_path, pictures[:1])
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["tasks.png", "tasks.svg"]
    figures.write(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_ids_of_one_page_differ() -> None:
    ids = [name for p in drawn().values() for name in re.findall(r' id="([^"]+)"', p.svg)]
    assert ids
    assert len(set(ids)) == len(ids)


def test_a_sweep_has_a_picture_for_each_quality() -> None:
    pictures = list(sweep_figures.pictures(fronts(points())))
    assert [p.name for p in pictures] == ["front-token_perplexity_t.txt"]
    assert "against parameters: small at 0.5, small at 0.8, dense" in pictures[0].text


def test_every_cost_has_a_panel_and_no_panel_is_empty() -> None:
    (front,) = fronts(points())
    text = next(iter(sweep_figures.pictures([front, front, front]))).svg
    assert text.count(">parameters</text>") == 3
    assert ">0.6</text>" not in text  # of axes that nothing was drawn on


def test_texts_of_alike_names_have_pictures_of_their_own() -> None:
    twice = [replace(DETAILS.tokens[0], data=data) for data in ("a/b.txt", "a_b.txt")]
    pictures = evaluation_figures.pictures([], Differences(tokens=tuple(twice)), {})
    assert [p.name for p in pictures] == ["positions-a_b.txt", "positions-a_b.txt-2"]


def test_more_variants_than_colours_have_other_marks() -> None:
    sizes = range(len(figures.COLOURS) + 2)
    many = [replace(points()[1], variant=f"v{size}", keep_ratio=0.8) for size in sizes]
    (front,) = fronts([points()[0], *many])
    shapes = re.findall(r'<path id="(m\w+)"', next(iter(sweep_figures.pictures([front]))).svg)
    assert len(set(shapes)) >= len(figures.COLOURS) + 2


def test_a_single_point_has_no_front_to_draw() -> None:
    assert not list(sweep_figures.pictures(fronts(points()[:1])))


def test_a_front_of_one_point_is_not_drawn_as_one() -> None:
    dense, low, *_ = points()
    worse = tuple(replace(metric, value=metric.value * 2) for metric in dense.metrics)
    (picture,) = sweep_figures.pictures(fronts([dense, replace(low, metrics=worse)]))
    assert ">Pareto front</text>" not in picture.svg
    assert "no front: dense is best in both" in picture.text
    (front,) = sweep_figures.pictures(fronts(points()))
    assert ">Pareto front</text>" in front.svg


def test_points_carry_their_keep_ratio_and_axes_their_label() -> None:
    (picture,) = sweep_figures.pictures(fronts(points()))
    for ratio in ("0.5", "0.8", "0.9"):
        assert f">{ratio}</text>" in picture.svg
    assert ">token perplexity, t.txt</text>" in picture.svg
    assert ">parameters</text>" in picture.svg


def test_parts_of_a_group_have_a_picture_of_their_own() -> None:
    content = grouped_tasks()
    tasks, parts = (p for p in content.pictures if p.name.startswith("tasks"))
    assert (tasks.section, parts.name, parts.section) == ("metrics", "tasks-mmlu", "parts of mmlu")
    assert "mmlu acc" in tasks.text
    assert "mmlu_stem" not in tasks.text
    assert "mmlu_stem acc" in parts.text


def test_a_legend_of_long_names_fits_its_picture() -> None:
    content = checkpoints()
    picture = next(p for p in content.pictures if p.section == "tokens")
    assert "factorized keep-0.6/…/model" in picture.svg
    assert "/home" not in picture.svg


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.0, 0.3)])
def test_blocks_without_any_error_are_drawn(errors: tuple[float, ...]) -> None:
    blocks = tuple(replace(block, errors=errors) for block in DETAILS.blocks)
    (picture,) = evaluation_figures.pictures([], Differences(blocks=blocks), {})
    assert picture.name == "blocks"


def test_lines_are_of_what_was_measured() -> None:
    """Inputs of some linears alone: then there is one line, and nothing on probes."""
    down = [linear for linear in RECORD["linears"] if linear["role"] == "down"]
    linears = [{**linear, "gradient_outlier_share": None} for linear in down]
    pictures = evaluation_figures.pictures([], Differences(), {"linears": linears, "probed": {}})
    by_name = {picture.name: picture for picture in pictures}
    assert "probes" not in by_name
    assert ">inputs of down</text>" in by_name["outliers"].svg
    assert ">inputs of gate and up</text>" not in by_name["outliers"].svg
    assert ">gradients of outputs</text>" not in by_name["outliers"].svg


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0, -1.0, 1e300])
def test_absurd_factors_are_drawn(factor: float) -> None:
    record = {"linears": RECORD["linears"], "probed": {"layers.0": factor}}
    assert "probes" in {p.name for p in evaluation_figures.pictures([], Differences(), record)}
