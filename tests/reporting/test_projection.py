"""Projections of longer trainings: right for a known law, none where it tells nothing."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from lrcompress.reporting.projection import project, sentence

STAYS, FALLS, EXPONENT, TOKENS_PER_STEP = 0.3, 0.5, 0.6, 1024


def true_loss(step: float) -> float:
    return float(STAYS + FALLS * step**-EXPONENT)


def curve(noise: float = 0.0, seed: int = 0, count: int = 12) -> list[tuple[int, float | None]]:
    """Measurements at step 0, and at `count` more up to step 4 `count`, as (tokens, loss)."""
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(count + 1))
    return [
        (TOKENS_PER_STEP * step, factor * (true_loss(step) if step else 2.0))
        for step, factor in zip(range(0, 4 * count + 1, 4), factors.tolist(), strict=True)
    ]


def test_an_exact_curve_is_continued() -> None:
    twice, ten_times = project(curve()).losses
    assert twice.tokens == 2 * 48 * TOKENS_PER_STEP
    assert ten_times.tokens == 10 * 48 * TOKENS_PER_STEP
    assert twice.loss == pytest.approx(true_loss(96), rel=1e-3)
    assert ten_times.loss == pytest.approx(true_loss(480), rel=1e-3)
    assert twice.high - twice.low < 1e-3


def test_the_interval_holds_the_true_loss_as_often_as_it_says() -> None:
    trials, inside, widths = 200, np.zeros(2), []
    for seed in range(trials):
        losses = project(curve(noise=0.01, seed=seed)).losses
        for index, (row, step) in enumerate(zip(losses, (96, 480), strict=True)):
            inside[index] += row.low <= true_loss(step) <= row.high
        widths.append([row.high - row.low for row in losses])
    assert all(inside >= 0.9 * trials)
    assert all(np.median(widths, axis=0) < 0.2 * STAYS)  # not by saying nothing


def test_the_first_loss_does_not_count() -> None:
    losses = curve()
    assert project(losses) == project([(0, 99.0), *losses[1:]])
    assert project(losses) == project(losses[1:])


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (curve(count=4), "there are 4 measurements after the first step, and it takes 5"),
        ([], "there are 0 measurements"),
        ([*curve(), (60_000, None)], "not all measured losses are positive"),
        ([*curve(), (60_000, 0.0)], "not all measured losses are positive"),
        ([(step, 1.0 + 0.1 * step) for step in range(1, 9)], "do not fall along a power law"),
        ([(step, 1.0 + 0.1 * (-1) ** step) for step in range(1, 9)], "power law"),
        ([(step, 1.0) for step in range(1, 9)], "power law"),
        (curve(noise=0.2, seed=1, count=5), "power law"),
    ],
)
def test_curves_that_tell_nothing_have_no_projection(
    losses: list[tuple[int, float | None]], reason: str
) -> None:
    projection = project(losses)
    assert projection.losses == ()
    assert reason in str(projection.reason)
    assert sentence(asdict(projection)).startswith("No loss is projected for longer trainings: ")


def test_the_sentence_has_both_losses() -> None:
    row = {"factor": 2, "tokens": 8, "loss": 0.41, "low": 0.38, "high": 0.44}
    rows = [row, row | {"factor": 10, "loss": 0.35, "low": 0.1, "high": 0.6}]
    assert sentence({"losses": rows, "reason": None}) == (
        "Projected held-out loss, rather too high than too low: 0.410 (0.380 to 0.440) for twice "
        "the tokens, 0.35 (0.10 to 0.60) for ten times the tokens. The 95 % intervals are of the "
        "fit alone."
    )
