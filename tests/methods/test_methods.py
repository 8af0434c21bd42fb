"""Contracts that every factorization method keeps, and what tells the methods apart."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrcompress.methods import registry
from lrcompress.methods.auto import Auto
from lrcompress.methods.linalg import (
    COEFFICIENT_LIMIT,
    WeightedNorm,
    decompose,
    nested_grams,
    pivot,
    spectrum,
)
from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.svd import DiagonalSVD, FisherSVD, PlainSVD, WhitenedSVD
from lrcompress.methods.types import FFN, Factors, LinearSpec, Role, Statistics
from lrcompress.runtime.errors import InputError

SHAPES = [(24, 16), (16, 24), (20, 20)]
METHODS = {name: pkgutil.resolve_name(home)() for name, home in registry.METHODS.items()}
TRUNCATING = {name: method for name, method in METHODS.items() if method.truncates}
each_method = pytest.mark.parametrize("method", TRUNCATING.values(), ids=list(TRUNCATING))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape: tuple[int, int], samples: int = 400) -> tuple[Tensor, Statistics]:
    """A random weight and inputs whose directions differ in size by a factor of 1000."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, shape[1], generator=generator, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -3, shape[1], dtype=torch.float64) @ mix
    g = torch.randn(samples, shape[0], generator=generator, dtype=torch.float64)
    g = g * torch.logspace(0, -2, shape[0], dtype=torch.float64)
    return weight, Statistics(x.T @ x / samples, g.T @ g / samples)


def factors_of(method: Any, weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    factors: Factors = method.decompose(weight, statistics, rank).factors(weight, rank)
    return factors


def measured_error(method: Any, statistics: Statistics, difference: Tensor) -> float:
    """‖G^1/2 D X^1/2‖² in the method's metrics, computed directly."""
    X, G = method.metric(statistics), method.output_metric(statistics)
    right = difference if X is None else X.multiply_right(difference)
    left = difference if G is None else G.matrix @ difference
    return float((left * right).sum())


def test_methods_that_read_no_text_are_those_without_moments() -> None:
    assert [name for name in METHODS if not METHODS[name].requires] == [*registry.READ_NO_TEXT]


@each_method
@each_shape
def test_full_rank_is_exact(method: Any, shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    factors = factors_of(method, weight, statistics, min(shape))
    torch.testing.assert_close(factors.B @ factors.A, weight, rtol=1e-6, atol=1e-6)
    assert factors.error <= 1e-9 * factors.energy


@each_method
@each_shape
def test_estimated_error_is_the_measured_error(method: Any, shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    curve = method.error_curve(weight, statistics)
    assert curve.shape == (min(shape) + 1,)
    assert bool((curve.diff() <= 0).all())
    assert curve[-1] == 0
    for rank in (1, 5, min(shape) - 1):
        factors = factors_of(method, weight, statistics, rank)
        assert factors.A.shape == (rank, shape[1])
        assert factors.B.shape == (shape[0], rank)
        difference = weight - factors.B @ factors.A
        measured = measured_error(method, statistics, difference)
        assert measured == pytest.approx(float(curve[rank]), rel=1e-6)
        assert factors.error == pytest.approx(measured, rel=1e-6)
    assert float(curve[0]) == pytest.approx(measured_error(method, statistics, weight))


def random_ffn() -> FFN:
    """An FFN of 6 features and 12 channels, of which channel 1 is hardly ever active."""
    shapes: dict[Role, tuple[int, int]] = {"up": (12, 6), "down": (6, 12)}
    specs = tuple(
        LinearSpec(role, 0, role, inputs, outputs, False, f"input of {role}", "ffn")
        for role, (outputs, inputs) in shapes.items()
    )
    problems = {role: problem(shape) for role, shape in shapes.items()}
    second_moment = problems["down"][1].second_moment
    assert second_moment is not None
    second_moment[1], second_moment[:, 1] = 0, 0
    second_moment[1, 1] = 1e-3
    return FFN(
        name="ffn",
        linears=specs,
        weights={role: weight for role, (weight, _) in problems.items()},
        biases=dict.fromkeys(shapes),
        statistics={role: statistics for role, (_, statistics) in problems.items()},
        whole=True,
    )


READING = {name: method for name, method in METHODS.items() if "second_moment" in method.requires}


@pytest.mark.parametrize("method", READING.values(), ids=list(READING))
def test_every_method_that_reads_inputs_keeps_the_outliers(method: Any) -> None:
    """A direction of which the mean says next to nothing costs a lot where outliers have it."""
    ffn = random_ffn()
    name = "down" if method.narrows else "up"
    statistics = ffn.statistics[name]
    assert statistics.second_moment is not None
    outlier = torch.zeros(len(statistics.second_moment), dtype=torch.float64)
    outlier[1] = 1e3
    sink = replace(statistics, outlier_moment=torch.outer(outlier, outlier))
    if method.narrows:
        with_sink = replace(ffn, statistics={**ffn.statistics, name: sink})
        assert int(method.order(with_sink).channels[0]) == 1
        assert int(method.order(ffn).channels[0]) != 1
    else:
        weight = ffn.weights[name]
        factors = factors_of(method, weight, sink, 2)
        lost = (weight - factors.B @ factors.A) @ outlier
        assert float(lost.norm()) < 1e-3 * float((weight @ outlier).norm())


@each_method
@each_shape
def test_no_other_factors_of_the_rank_are_better(method: Any, shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    factors = factors_of(method, weight, statistics, 4)
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-2, 1e-1):
        A = factors.A + size * torch.randn(factors.A.shape, generator=generator)
        B = factors.B + size * torch.randn(factors.B.shape, generator=generator)
        assert measured_error(method, statistics, weight - B @ A) > factors.error


@each_method
def test_same_input_same_factors(method: Any) -> None:
    weight, statistics = problem((24, 16))
    first, second = (factors_of(method, weight, statistics, 5) for _ in range(2))
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


@each_method
@each_shape
def test_one_decomposition_serves_every_rank(method: Any, shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    decomposition = method.decompose(weight, statistics, 3)
    for rank in range(1, min(shape) + 1):
        assert decomposition.serves(rank)
        shared = decomposition.factors(weight, rank)
        alone = factors_of(method, weight, statistics, rank)
        assert torch.equal(shared.A, alone.A)
        assert torch.equal(shared.B, alone.B)
        assert (shared.error, shared.energy) == (alone.error, alone.energy)


def test_the_randomized_method_is_not_mixed_with_the_exact_one() -> None:
    weight = torch.randn(1024, 1030, generator=torch.Generator().manual_seed(0)).double()
    quick, exact = PlainSVD().decompose(weight, Statistics(), 16), decompose(weight)
    assert quick.left.shape == (1024, 16)
    assert [quick.serves(rank) for rank in (15, 16, 17, 500)] == [False, True, False, False]
    assert [exact.serves(rank) for rank in (16, 128, 129, 1024)] == [False, False, True, True]


@each_method
@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_rank_is_refused(method: Any, rank: int) -> None:
    weight, statistics = problem((24, 16))
    with pytest.raises(InputError, match=rf"rank {rank} is not in 1\.\.16"):
        factors_of(method, weight, statistics, rank)


@each_method
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_degenerate_moments_give_finite_factors(method: Any, shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    X, G = statistics.second_moment, statistics.gradient_moment
    assert X is not None
    assert G is not None
    single_entry = torch.zeros_like(X)
    single_entry[3, 3] = 2.0
    for moment in (torch.zeros_like(X), single_entry, X * 1e30, X * 1e-30, torch.ones_like(X)):
        scale = float(moment.abs().max())
        case = Statistics(moment, G * scale)
        factors = factors_of(method, weight, case, 4)
        assert bool(factors.A.isfinite().all())
        assert bool(factors.B.isfinite().all())
        full = factors_of(method, weight, case, 16)
        y, expected = full.B @ full.A @ moment, weight @ moment
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * scale)


@each_method
def test_zero_weight(method: Any) -> None:
    _, statistics = problem((24, 16))
    factors = factors_of(method, torch.zeros(24, 16), statistics, 4)
    assert bool((factors.B @ factors.A == 0).all())


def test_each_method_wins_in_its_own_metric() -> None:
    weight, statistics = problem((24, 16))
    methods = [PlainSVD(), DiagonalSVD(), WhitenedSVD(), FisherSVD()]
    for judge in methods:
        errors = []
        for method in methods:
            factors = factors_of(method, weight, statistics, 5)
            errors.append(measured_error(judge, statistics, weight - factors.B @ factors.A))
        assert min(errors) == errors[methods.index(judge)]


@each_shape
def test_spectrum_is_that_of_the_decomposition(shape: tuple[int, int]) -> None:
    weight, statistics = problem(shape)
    metrics = FisherSVD().metric(statistics), FisherSVD().output_metric(statistics)
    expected = decompose(weight, *metrics).energies
    torch.testing.assert_close(spectrum(weight, *metrics), expected)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 2.0}])
def test_bad_damping_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="damping"):
        WhitenedSVD(**options)


@pytest.mark.parametrize("option", ["shrinkage", "output_shrinkage"])
@pytest.mark.parametrize("kind", [FisherSVD, Nystrom, Auto])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_bad_shrinkage_is_refused(option: str, kind: Any, value: float) -> None:
    with pytest.raises(InputError, match=rf"shrinkage {value} is not in \[0, 1\]"):
        kind(**{option: value})


def test_shrinkage_keeps_sizes_and_takes_off_correlations() -> None:
    _, statistics = problem((24, 16))
    X, G = statistics.second_moment, statistics.gradient_moment
    assert X is not None
    assert G is not None
    whole = FisherSVD(shrinkage=1, output_shrinkage=1, damping=1e-9, output_damping=1e-9)
    for metric, moment in ((whole.metric(statistics), X), (whole.output_metric(statistics), G)):
        torch.testing.assert_close(metric.matrix, torch.diag(moment.diagonal()), atol=1e-8, rtol=0)
    half = FisherSVD(shrinkage=0.5, damping=1e-9).metric(statistics).matrix
    torch.testing.assert_close(half, (X + torch.diag(X.diagonal())) / 2, atol=1e-8, rtol=0)
    none = WhitenedSVD().metric(statistics).matrix
    torch.testing.assert_close(none, FisherSVD(shrinkage=0, damping=1e-6).metric(statistics).matrix)


def test_shrinkage_helps_on_text_that_was_not_measured() -> None:
    """Few samples of many features: the factors of the shrunk moments err less on others."""
    size = 64
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double()
    true = torch.eye(size, dtype=torch.float64)
    errors = {}
    for shrinkage in (0.0, 0.3):
        method = FisherSVD(shrinkage=shrinkage, output_shrinkage=shrinkage)
        sample_errors = []
        for seed in range(5):
            g = torch.Generator().manual_seed(seed)
            x, y = (torch.randn(size + 16, size, generator=g).double() for _ in range(2))
            few = Statistics(x.T @ x / len(x), y.T @ y / len(y))
            factors = factors_of(method, weight, few, 16)
            difference = weight - factors.B @ factors.A
            sample_errors.append(float((difference @ true * difference).sum()))
        errors[shrinkage] = sum(sample_errors)
    assert errors[0.3] < 0.9 * errors[0.0]


def test_method_without_its_statistics_says_so() -> None:
    with pytest.raises(InputError, match="calibrate first"):
        factors_of(WhitenedSVD(), torch.ones(4, 4), Statistics(), 2)


def singular(size: int) -> torch.Tensor:
    """A moment of half the rank, damped so little that its Cholesky factor is not to be trusted."""
    half = torch.randn(
        size, size // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return half @ half.T + 1e-17 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["diagonal", "plain", "singular"])
def test_a_root_and_its_inverse_belong_to_the_metric(kind: str) -> None:
    moment = problem((8, 8))[1].second_moment
    assert moment is not None
    stored = {"diagonal": moment.diagonal().double(), "plain": moment, "singular": singular(8)}[
        kind
    ]
    matrix = torch.diag(stored) if stored.ndim == 1 else stored.double()
    metric, eye = WeightedNorm(stored), torch.eye(8, dtype=torch.float64)
    left, right = metric.unscale(eye)
    torch.testing.assert_close(right @ right.T, matrix)
    torch.testing.assert_close(right.T, metric.scale(eye))
    torch.testing.assert_close(left.T @ right, eye, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", [-4, -0.2], ids=["decaying", "flat"])
@pytest.mark.parametrize("shape", [(1100, 1400), (1400, 1100)], ids=str)
def test_randomized_range_finder_is_as_good_as_the_exact_one(
    last: float, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = weight * torch.logspace(0, last, shape[1], dtype=torch.float64)
    exact, quick = decompose(weight), decompose(weight, rank=64)
    assert exact.energies.shape == (1100,)
    assert quick.energies.shape == (64,), "the randomized method was not used"
    factors = quick.factors(weight, 64)
    measured = float((weight - factors.B @ factors.A).norm() ** 2)
    assert quick.error(64) == pytest.approx(measured, rel=1e-9)
    assert exact.error(64) <= measured * (1 + 1e-9) <= 1.01 * exact.error(64)


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_pivoted_form_is_the_same_product(rank: int) -> None:
    weight, statistics = problem((24, 16))
    factors = factors_of(WhitenedSVD(), weight, statistics, rank)
    pivoted = pivot(factors.A, factors.B)
    assert pivoted.columns.shape == (24, rank)
    assert pivoted.coefficients.shape == (rank, 16 - rank)
    product = torch.empty(24, 16, dtype=torch.float64)
    product[:, pivoted.order] = torch.cat(
        [pivoted.columns, pivoted.columns @ pivoted.coefficients], dim=1
    )
    torch.testing.assert_close(product, factors.B @ factors.A, rtol=1e-9, atol=1e-9)
    assert sorted(pivoted.order.tolist()) == list(range(16))
    assert float(pivoted.coefficients.abs().max()) <= COEFFICIENT_LIMIT


def test_pivots_for_the_sizes_of_the_inputs_bear_rounding_better() -> None:
    """Same product; loud inputs are pivots; C and Z in int8, by rows, err less on such inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(48, generator=generator, dtype=torch.float64))
    A, B = (torch.randn(*shape, generator=generator).double() for shape in ((12, 48), (32, 12)))
    x = sizes * torch.randn(500, 48, generator=generator)
    error, pivot_size = {}, {}
    for name, scale in (("plain", None), ("scaled", sizes.clamp_min(sizes.median()))):
        pivoted = pivot(A, B, scale)
        whole = torch.cat([pivoted.columns, pivoted.columns @ pivoted.coefficients], dim=1)
        torch.testing.assert_close(whole[:, pivoted.order.argsort()], B @ A)
        C, Z = _rounded(pivoted.columns), _rounded(pivoted.coefficients)
        y = (x[:, pivoted.order[:12]] + x[:, pivoted.order[12:]] @ Z.T) @ C.T
        error[name] = float((y - x @ A.T @ B.T).norm() / (x @ A.T @ B.T).norm())
        pivot_size[name] = float(sizes[pivoted.order[:12]].median())
    assert error["scaled"] < 0.8 * error["plain"]
    assert pivot_size["scaled"] > pivot_size["plain"]


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def random_matrix(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_pivots_of_a_singular_factor() -> None:
    """Rows of A that repeat others, and one of zeros, still give finite coefficients."""
    A = random_matrix(6, 20)
    A[4], A[5] = 0, A[0] - 2 * A[1]
    B = random_matrix(10, 6)
    pivoted = pivot(A, B)
    product = torch.cat([pivoted.columns, pivoted.columns @ pivoted.coefficients], dim=1)
    torch.testing.assert_close(product, (B @ A)[:, pivoted.order])


def test_nested_grams_are_those_of_each_selection() -> None:
    """Also beside a column as large as an outlier's, in the precision of the small ones."""
    W, root = random_matrix(12, 5), random_matrix(12, 12)
    W[:, 2] *= 1e4
    metric, groups = root @ root.T, [torch.tensor(rows) for rows in ([7], [2, 11, 0], [5, 3])]
    grams = list(nested_grams(W, metric, groups))
    for count, gram in enumerate(grams, 1):
        rows = torch.cat(groups[:count])
        expected = W[rows].T @ metric[rows][:, rows] @ W[rows]
        sizes = expected.diagonal().sqrt()
        scale = torch.outer(sizes, sizes)
        torch.testing.assert_close(gram / scale, expected / scale, rtol=0, atol=1e-5)
