"""Scaling laws are found again in data that obey them, as often as the intervals say."""

from __future__ import annotations

import numpy as np
import pytest

from lrcompress.runtime.errors import InputError
from lrcompress.workflows.scaling.curvature import bend
from lrcompress.workflows.scaling.law_fit import Law, compare, fit, predicted

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
        found = fit(SIZES, synthetic(law, seed), law, resamples, seed).slope
        inside += TRUE[law][1] in found
        widths.append(found.high - found.low)
    assert inside >= 0.9 * trials
    assert np.median(widths) < TRUE[law][1]  # not by saying nothing


def test_exact_data_give_the_exact_law() -> None:
    for law, true in TRUE.items():
        found = fit(SIZES, synthetic(law, 0, noise=0.0), law, 50)
        assert found.parameters == pytest.approx(true, rel=1e-3)
        np.testing.assert_allclose(found.loss(SIZES), synthetic(law, 0, noise=0.0), rtol=1e-4)


def test_one_point_that_is_wrong_moves_little() -> None:
    losses = synthetic("power", 0, noise=0.002)
    losses[3] *= 1.5
    line = np.polyfit(np.log(SIZES), np.log(losses), 1)
    found = fit(SIZES, losses, "power", 100)
    assert abs(found.parameters[1] - 0.05) < 0.2 * abs(-line[0] - 0.05)


def test_slopes_are_compared() -> None:
    flat = fit(SIZES, synthetic("decade", 1), "decade", 300, seed=1)
    other = fit(SIZES, synthetic("decade", 2), "decade", 300, seed=2)
    steep = fit(SIZES, synthetic("decade", 3, slope=0.45), "decade", 300, seed=3)
    found = compare(steep, flat)
    assert found.verdict == "steeper"
    assert found.p_value < 0.01
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
    found = fit(SIZES, synthetic("power", 5), "power", 200)
    low, high = found.band(SIZES)
    exact = predicted("power", np.array([TRUE["power"]]), SIZES)[0]
    assert np.mean((low <= exact) & (exact <= high)) >= 0.9


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="add sizes or seeds"):
        fit([1e12, 1e13], [5.0, 4.0], "power")
    with pytest.raises(InputError, match="needs 3 sizes"):
        fit([1e12, 1e12, 1e13, 1e13], [5.0, 5.1, 4.0, 4.1], "offset")


def bent(seed: int, sizes: np.ndarray, steeper: float, bow: float = -0.3) -> np.ndarray:
    """Losses on a parabola in log x; `steeper` nats per decade about its middle."""
    z = np.log10(sizes) - 14
    noise = 0.02 * np.random.default_rng(seed).standard_normal(len(sizes))
    return np.asarray(5 - (0.5 + steeper) * z + bow * z * z + noise)


CHEAPER = SIZES / 10


def test_a_bend_does_not_pass_for_a_slope() -> None:
    """Two variants of one bent curve, one of which is cheaper at every size."""
    trials, fooled, right = 200, 0, 0
    for seed in range(trials):
        x, base = bent(2 * seed, CHEAPER, 0.0), bent(2 * seed + 1, SIZES, 0.0)
        line = compare(fit(CHEAPER, x, "decade", 50), fit(SIZES, base, "decade", 50))
        fooled += line.verdict == "less steep"
        found = bend(CHEAPER, x, SIZES, base)
        assert found is not None
        assert found.is_shown
        right += 0.0 in found.steeper and 0.0 in found.level
    assert fooled > 0.9 * trials
    assert right >= 0.85 * trials  # two intervals of 95 %


def test_a_slope_is_found_beside_a_bend() -> None:
    trials, inside = 200, 0
    for seed in range(trials):
        found = bend(CHEAPER, bent(seed, CHEAPER, 0.2), SIZES, bent(-seed - 1 + 10**6, SIZES, 0.0))
        assert found is not None
        inside += 0.2 in found.steeper
        assert found.verdict == "steeper"
    assert inside >= 0.9 * trials


def test_straight_points_are_not_said_to_bend() -> None:
    said = [
        bend(CHEAPER, bent(s, CHEAPER, 0.0, 0.0), SIZES, bent(s + 10**6, SIZES, 0.0, 0.0))
        for s in range(200)
    ]
    assert sum(one is not None and one.is_shown for one in said) <= 0.1 * len(said)


def test_too_few_points_have_no_bend() -> None:
    assert bend([1e3, 1e4], [3.0, 2.0], [1e3, 1e4, 1e5], [3.0, 2.0, 1.5]) is None
