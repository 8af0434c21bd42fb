"""Laws of points with known slopes: verdicts in words, losses at equal cost, pairs."""

from __future__ import annotations

import pytest

from lrcompress.workflows.scaling.comparison import (
    fit_laws,
    match_costs,
    pair_equal_flops,
    verdicts,
)
from tests.samples import scaling_points


def test_a_steeper_law_is_said_to_be_steeper() -> None:
    points = scaling_points({"dense": 0.35, "steep": 0.40, "same": 0.35})
    laws = fit_laws(points, 200)
    sentences = {
        sentence.split(":")[0]: sentence
        for sentence in verdicts(laws, points)
        if "FLOPs" in sentence
    }
    assert sentences["steep"].startswith(
        "steep: steeper than dense per decade of training FLOPs: 0.4"
    )
    assert "The fitted lines cross at" in sentences["steep"]
    assert sentences["same"].startswith("same: not shown to differ from dense")
    assert "cannot be said" in sentences["same"]
    line = next(
        law for law in laws if (law.variant, law.axis, law.fit.law) == ("steep", "flops", "decade")
    )
    assert 0.40 in line.fit.slope
    assert line.against is not None
    assert line.against.crossing is not None
    assert 1e14 in line.against.crossing  # 0.1 nats behind, 0.05 gained a decade


def test_losses_at_equal_cost_are_interpolated() -> None:
    points = scaling_points({"dense": 0.35, "low": 0.35}, noise=1e-6)
    for match in match_costs(points, fit_laws(points, 50)):
        assert match.difference is not None
        assert match.difference.value == pytest.approx(0.1, abs=1e-3)
        if match.loss is not None:
            assert match.loss - match.dense == pytest.approx(0.1, abs=1e-3)
    (pair,) = pair_equal_flops(points, {"low": "dense"})
    assert pair.verdict == "worse"
    assert pair.difference.value == pytest.approx(0.1, abs=1e-3)
    assert pair.count == 8
