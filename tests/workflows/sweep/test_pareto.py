"""Fronts and knees of hand-made points with known answers, and what holds for any points."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from lrcompress.reporting.metric import PERPLEXITY, Metric
from lrcompress.workflows.sweep.pareto import (
    Front,
    fronts,
    knee,
    non_dominated,
    not_shown_dominated,
    over_dense,
)
from lrcompress.workflows.sweep.point import SweepPoint
from lrcompress.workflows.sweep.report import FORMATS, SweepReport, markdown, to_csv, to_json

TEXT = {"data": "t.txt", "windows": 8}
RUN = {"runs": 5, "device": "cpu", "threads": 1}


def size(model: str, parameters: int) -> Metric:
    return Metric(model, "parameters", parameters, "", False)


def quality(model: str, perplexity: float, **changes: object) -> Metric:
    return Metric(model, PERPLEXITY, perplexity, "", False, TEXT | changes)


def speed(model: str, rate: float, spread: float = 0.0, **changes: object) -> Metric:
    ends = (rate - spread, rate + spread)
    return Metric(model, "decode", rate, "tokens/s", True, RUN | changes, *ends)


def point(
    variant: str, ratio: float, *metrics: Metric, baseline: tuple[Metric, ...] = ()
) -> SweepPoint:
    return SweepPoint(variant, ratio, ratio, 1.0, None, "", metrics, baseline)


def sized(*pairs: tuple[int, float]) -> list[SweepPoint]:
    """Points by parameters and perplexity, the first one dense."""
    points = [point("dense", 1.0, size("dense", pairs[0][0]), quality("dense", pairs[0][1]))]
    for parameters, perplexity in pairs[1:]:
        metrics = (size("m", parameters), quality("m", perplexity))
        points.append(point("m", parameters / pairs[0][0], *metrics))
    return points


def report(points: list[SweepPoint]) -> SweepReport:
    return SweepReport("model", tuple(points))


def only(points: list[SweepPoint]) -> Front:
    (front,) = fronts(points)
    return front


def test_front_and_knee_of_known_points() -> None:
    front = only(sized((100, 10.0), (80, 11.0), (70, 80.0), (60, 40.0), (50, 160.0)))
    assert [p.x for p in front.on_front] == [50, 60, 80, 100]
    assert [p.on_front for p in front.points] == [True, True, False, True, True]
    assert front.knee is not None
    assert front.knee.label == "m at 0.8"
    assert (front.quality.title, front.quality.scale) == (f"{PERPLEXITY}, t.txt", "log")
    assert (front.cost.title, front.cost.scale) == ("parameters", "linear")
    assert not front.quality.higher_is_better
    assert front.left_out == ()


def test_the_knee_is_found_on_the_logarithm_of_a_perplexity() -> None:
    # at half of the parameters the chord is at 100, the geometric mean of its ends, and at 505 on a
    # linear scale
    assert only(sized((100, 10.0), (75, 90.0), (50, 99.0), (0, 1000.0))).knee is not None
    front = only(sized((100, 10.0), (75, 90.0), (50, 110.0), (0, 1000.0)))
    assert len(front.on_front) == 4
    assert front.knee is None


def test_fewer_than_three_points_have_no_knee() -> None:
    assert only(sized((100, 10.0), (50, 20.0))).knee is None
    assert only(sized((100, 10.0), (50, 20.0), (50, 20.0))).knee is None
    assert only(sized((100, 10.0), (90, 9.0))).on_front[0].x == 90


def test_a_straight_front_or_one_that_bends_inwards_has_no_knee() -> None:
    straight = [(1.0, 0.0), (0.9, 0.1), (0.5, 0.5), (0.0, 1.0)]
    assert knee(straight) is None
    assert knee([(1.0, 0.0), (0.3, 0.3), (0.0, 1.0)]) is None
    assert knee([(10.0, 0.0), None, (7.0, 7.0), (8.0, 5.0), (0.0, 10.0)]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_front_of_any_points(seed: int) -> None:
    draw = random.Random(seed)
    goods = [(float(draw.randint(0, 9)), float(draw.randint(0, 9))) for _ in range(30)]
    kept = non_dominated(goods)
    assert any(kept)
    for (x, y), on_front in zip(goods, kept, strict=True):
        better = [(a, b) for a, b in goods if (a > x and b >= y) or (a >= x and b > y)]
        assert bool(better) != on_front
    at = knee([good if on else None for good, on in zip(goods, kept, strict=True)])
    assert at is None or kept[at]


def test_the_front_does_not_depend_on_the_order_of_points() -> None:
    pairs = [(100, 10.0), (80, 11.0), (70, 80.0), (60, 40.0), (50, 160.0)]
    first, turned = only(sized(*pairs)), only(sized(pairs[0], *reversed(pairs[1:])))
    assert [p.x for p in first.on_front] == [p.x for p in turned.on_front]
    assert first.knee is not None
    assert turned.knee is not None
    assert first.knee.x == turned.knee.x


def test_a_speed_counts_over_the_dense_model_of_its_own_run() -> None:
    dense = point("dense", 1.0, quality("dense", 10.0), speed("dense", 100.0, 10.0))
    beside = (speed("dense", 50.0, 10.0),)  # the machine was busier, for both
    compressed = point("m", 0.5, quality("m", 20.0), speed("m", 60.0, 6.0), baseline=beside)
    front = only([dense, compressed])
    points = {p.variant: p for p in front.points}
    assert (points["dense"].x, points["m"].x) == (1.0, 1.2)
    assert (points["m"].x_low, points["m"].x_high) == (54 / 60, 66 / 40)
    assert front.cost.higher_is_better
    assert all(p.on_front for p in front.points)
    assert over_dense(replace(compressed, baseline=()), dense, "decode") is None


def _timed(ratio: float, perplexity: float, rate: float, spread: float) -> SweepPoint:
    """A point whose speed is that of a dense model of exactly 100 tokens/s in its run."""
    return point(
        "m", ratio, quality("m", perplexity), speed("m", rate, spread), baseline=(speed("d", 100),)
    )


def test_a_speed_that_is_better_within_its_range_dominates_nothing() -> None:
    dense = point("dense", 1.0, quality("dense", 10.0), speed("dense", 100.0))
    near = only([dense, _timed(0.9, 12.0, 110, 8), _timed(0.8, 13.0, 105, 8)])
    assert [p.on_front for p in near.points] == [True, True, True]
    assert [p.leads for p in near.points] == [True, True, False]
    assert near.description == "dense, m at 0.9; within intervals also m at 0.8"
    far = only([dense, _timed(0.9, 12.0, 125, 4), _timed(0.8, 13.0, 105, 8)])
    assert [p.on_front for p in far.points] == [True, True, False]
    assert far.description == "dense, m at 0.9"


def test_a_front_of_one_point_is_called_none() -> None:
    dense = point("dense", 1.0, quality("dense", 10.0), speed("dense", 100.0))
    alone = only([dense, _timed(0.9, 12.0, 90, 4)])
    assert alone.description == "no front: dense is best in both"
    assert "| no front: dense is best in both | no knee |" in markdown(
        report([dense, _timed(0.9, 12.0, 90, 4)])
    )


@pytest.mark.parametrize("seed", range(5))
def test_without_ranges_nothing_is_dominated_but_by_its_numbers(seed: int) -> None:
    draw = random.Random(seed)
    goods = [(float(draw.randint(0, 9)), float(draw.randint(0, 9))) for _ in range(30)]
    exact = [((x, x), (y, y)) for x, y in goods]
    assert not_shown_dominated(exact) == non_dominated(goods)
    for widths in ((1, 0), (0, 1), (1, 1)):
        a, b = widths
        wide = not_shown_dominated([((x - a, x + a), (y - b, y + b)) for x, y in goods])
        assert all(w or not n for w, n in zip(wide, non_dominated(goods), strict=True))


def _scored(ratio: float, parameters: int, score: float, error: float) -> SweepPoint:
    shared = {"task_version": 1.0}
    accuracy = Metric("m", "q acc", score, "", True, shared, score - error, score + error)
    variant = "dense" if ratio == 1 else "m"
    return point(variant, ratio, size("m", parameters), accuracy)


def test_a_score_that_is_better_within_its_interval_dominates_nothing() -> None:
    near = only([_scored(1, 100, 0.50, 0.02), _scored(0.8, 80, 0.51, 0.02)])
    assert [p.on_front for p in near.points] == [True, True]
    assert [p.leads for p in near.points] == [False, True]
    assert near.description == "m at 0.8; within intervals also dense"
    far = only([_scored(1, 100, 0.50, 0.02), _scored(0.8, 80, 0.55, 0.02)])
    assert [p.on_front for p in far.points] == [False, True]


def test_speeds_are_shown_with_their_ranges() -> None:
    dense = point("dense", 1.0, quality("dense", 10.0), speed("dense", 100.0, 5.0))
    beside = (speed("dense", 50.0, 10.0),)
    compressed = point("m", 0.5, quality("m", 20.0), speed("m", 60.0, 6.0), baseline=beside)
    text = markdown(report([dense, compressed]))
    assert "| m at 0.5 | 1.2x (0.9–1.65), 60 against 50 |" in text
    assert "| dense | 1x, 100 |" in text


def test_parts_of_a_group_have_no_front() -> None:
    shared = {"task_version": 1.0}
    scores = (
        Metric("dense", "mmlu acc", 0.5, "", True, shared, parts=["mmlu_law acc"]),
        Metric("dense", "mmlu_law acc", 0.4, "", True, shared),
    )
    points = [point("dense", 1.0, size("dense", 100), *scores)]
    assert [front.quality.title for front in fronts(points)] == ["mmlu acc"]
    text = markdown(report(points))
    assert text.index("| point | mmlu acc |") < text.index("<summary>mmlu: its 1 parts</summary>")
    assert "| point | mmlu_law acc |" in text


@pytest.mark.parametrize(
    "other",
    [
        point("m", 0.5, quality("m", 5.0, windows=4), size("m", 10)),
        point("m", 0.5, quality("m", float("nan")), size("m", 10)),
        point("m", 0.5, size("m", 10)),
    ],
    ids=["other conditions", "not a number", "missing"],
)
def test_what_does_not_compare_is_left_out_and_named(other: SweepPoint) -> None:
    front = only([*sized((100, 10.0), (80, 11.0)), other])
    assert front.left_out == ("m at 0.5",)
    assert [p.x for p in front.points] == [100, 80]
    text = markdown(report([*sized((100, 10.0), (80, 11.0)), other]))
    assert "conditions differ: m at 0.5." in text


@pytest.mark.parametrize("changed", [{"threads": 2}, {"device": "cuda"}])
def test_speeds_of_other_conditions_are_left_out(changed: dict[str, Any]) -> None:
    dense = point("dense", 1.0, quality("dense", 10.0), speed("dense", 100.0))
    beside = (speed("dense", 50.0, **changed),)
    compressed = point("m", 0.5, quality("m", 20.0), speed("m", 60.0, **changed), baseline=beside)
    assert only([dense, compressed]).left_out == ("m at 0.5",)
    assert "| m at 0.5 | not comparable, 60 against 50 |" in markdown(report([dense, compressed]))


def test_every_quality_meets_every_cost() -> None:
    metrics = (
        Metric("dense", "FFN parameters", 60, "", False),
        size("dense", 100),
        Metric("dense", "weight bytes", 400, "B", False, {"dtype": "float32"}),
        quality("dense", 10.0),
        Metric("dense", "arc acc", 0.5, "", True, {"samples": 8}, 0.4, 0.6),
        speed("dense", 100.0),
    )
    all_fronts = fronts([point("dense", 1.0, *metrics)])
    assert [(front.quality.title, front.cost.title) for front in all_fronts] == [
        (quality, cost)
        for quality in (f"{PERPLEXITY}, t.txt", "arc acc")
        for cost in ("parameters", "weight bytes", "decode speed over dense")
    ]
    accuracy = all_fronts[3]
    assert (accuracy.quality.higher_is_better, accuracy.quality.scale) == (True, "linear")
    assert (accuracy.points[0].y_low, accuracy.points[0].y_high) == (0.4, 0.6)


def test_reports_name_the_knee_and_hold_everything() -> None:
    points = sized((100, 10.0), (80, 11.0), (60, 40.0), (50, 160.0))
    text = markdown(report(points))
    assert "| m at 0.5, m at 0.6, m at 0.8, dense | knee: m at 0.8 |" in text
    stored = json.loads(to_json(report(points)))
    assert stored["fronts"][0]["knee"]["keep_ratio"] == 0.8
    assert [point["metrics"][0]["value"] for point in stored["points"]] == [100, 80, 60, 50]
    assert set(FORMATS) == {"sweep.md", "sweep.html", "sweep.json", "sweep.csv"}


def test_csv_has_a_row_for_each_metric_with_its_conditions() -> None:
    beside = (speed("dense", 50.0),)
    compressed = point("a, b", 0.5, quality("a, b at 0.5", 20.0), baseline=beside)
    rows = list(csv.DictReader(io.StringIO(to_csv(report([*sized((100, 10.0)), compressed])))))
    assert [row["name"] for row in rows] == ["parameters", PERPLEXITY, PERPLEXITY, "decode"]
    assert [row["variant"] for row in rows] == ["dense", "dense", "a, b", "a, b"]
    assert [row["model"] for row in rows][2:] == ["a, b at 0.5", "dense"]
    assert (rows[2]["value"], rows[2]["windows"], rows[2]["runs"]) == ("20.0", "8", "")
    assert (rows[3]["windows"], rows[3]["runs"]) == ("", "5")
