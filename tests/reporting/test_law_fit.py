"""Scaling laws are found again in data that obey them, as often as the intervals say."""

from __future__ import annotations

import numpy as np
import pytest

from lrcompress.reporting.law_fit import Law, compare, fit, predicted
from lrcompress.runtime.errors import InputError

SIZES = np.repeat(np.geomspace(1e12, 1e16, 6), 2)
TRUE: dict[Law, tuple[float, ...]] = {
    "power": (3.0, 0.05),
    "decade": (9.0, 0.36),
    "offset": (8.0, 0.25, 1.7),
}


def synthetic(law: Law, seed: int, noise: float = 0.01, slope: float | None = None) -> np.ndarray:
    a, b, *rest = TRUE[law]
    exact = predicted(law, np.array([[a, slope or b, *rest]]), SIZES)[0]
    return np.asarray(
        exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(exact)))
    )


@pytest.mark.parametrize(("law", "resamples"), [("power", 300), ("decade", 300), ("offset", 300)])
def test_a_known_slope_is_in_its_interval(law: Law, resamples: int) -> None:
    trials, inside, widths = 200, 0, []
    for seed in range(trials):
        slope = fit(SIZES, synthetic(law, seed), law, resamples, seed).slope
        inside += TRUE[law][1] in slope
        widths.append(slope.high - slope.low)
    assert inside >= 0.9 * trials
    assert np.median(widths) < TRUE[law][1]  # not by saying nothing


def test_exact_data_give_the_exact_law() -> None:
    for law, true in TRUE.items():
        exact = fit(SIZES, synthetic(law, 0, noise=0.0), law, 50)
        assert exact.parameters == pytest.approx(true, rel=1e-3)
        np.testing.assert_allclose(exact.loss(SIZES), synthetic(law, 0, noise=0.0), rtol=1e-4)


def test_one_point_that_is_wrong_moves_little() -> None:
    losses = synthetic("power", 0, noise=0.002)
    losses[3] *= 1.5
    line = np.polyfit(np.log(SIZES), np.log(losses), 1)
    robust = fit(SIZES, losses, "power", 100)
    assert abs(robust.parameters[1] - 0.05) < 0.2 * abs(-line[0] - 0.05)


def test_slopes_are_compared() -> None:
    flat = fit(SIZES, synthetic("decade", 1), "decade", 300, seed=1)
    other = fit(SIZES, synthetic("decade", 2), "decade", 300, seed=2)
    steep = fit(SIZES, synthetic("decade", 3, slope=0.45), "decade", 300, seed=3)
    comparison = compare(steep, flat)
    assert comparison.verdict == "steeper"
    assert comparison.p_value < 0.01
    assert compare(flat, steep).verdict == "less steep"
    assert compare(other, flat).verdict == "not shown to differ"
    assert compare(other, flat).p_value > 0.05


def test_equal_slopes_are_seldom_told_apart() -> None:
    fits = [fit(SIZES, synthetic("power", seed), "power", 200, seed) for seed in range(200)]
    pairs = zip(fits[::2], fits[1::2], strict=True)
    wrong = sum(compare(*pair).p_value < 0.05 for pair in pairs)
    assert wrong <= 12  # 5 of 100 are expected


def test_the_crossing_is_where_both_are_equal() -> None:
    flat = fit(SIZES, synthetic("decade", 1, noise=0.001), "decade", 200, seed=1)
    steep = fit(
        SIZES, synthetic("decade", 2, noise=0.001, slope=0.45) + 1.53, "decade", 200, seed=2
    )
    crossing = compare(steep, flat).crossing
    assert crossing is not None
    assert crossing.low < 1e17 < crossing.high
    assert crossing.high / crossing.low < 10


def test_bands_hold_the_curve() -> None:
    power = fit(SIZES, synthetic("power", 5), "power", 200)
    low, high = power.band(SIZES)
    exact = predicted("power", np.array([TRUE["power"]]), SIZES)[0]
    assert np.mean((low <= exact) & (exact <= high)) >= 0.9


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="add sizes or seeds"):
        fit([1e12, 1e13], [5.0, 4.0], "power")
    with pytest.raises(InputError, match="needs 3 sizes"):
        fit([1e12, 1e12, 1e13, 1e13], [5.0, 5.1, 4.0, 4.1], "offset")


def test_the_irreducible_loss_may_be_above_the_lowest_one() -> None:
    x = np.linspace(1, 50, 50)
    for seed in range(10):
        noise = np.exp(0.03 * np.random.default_rng(seed).standard_normal(50))
        irreducible = fit(x, (1 + 1 / x**2) * noise, "offset", 200).parameters[2]
        assert noise.min() < 0.96
        assert irreducible == pytest.approx(1, abs=0.02)
