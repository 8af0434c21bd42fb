"""Outlier tokens are scaled down in moments, and what the moments lack is kept exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrcompress.compression.anchored import RidgeFit
from lrcompress.compression.calibration import outliers
from lrcompress.compression.calibration.moments import measure_errors, measure_moments
from lrcompress.compression.calibration.outliers import OutlierRows, clip_scales, outlier_rows
from lrcompress.compression.calibration.token_sums import TokenSums
from lrcompress.compression.planning import prepare
from lrcompress.config import FactorizeSettings
from lrcompress.layers.ffn_layouts import find_blocks, select
from lrcompress.methods.svd import WhitenedSVD
from lrcompress.methods.types import Statistics
from lrcompress.runtime.progress import silent
from tests.tiny import tiny_model, tokens

SINK = 1e4


def vectors_with_outliers() -> Tensor:
    """Vectors (64, 6) of norm 1, but one of norm 100 and one of zeros."""
    vectors = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    vectors /= vectors.norm(dim=1, keepdim=True)
    vectors[3] *= 100
    vectors[5] = 0
    return vectors


def test_an_outlier_counts_with_four_times_the_median_norm() -> None:
    scales = clip_scales(vectors_with_outliers().norm(dim=1))
    assert scales[3] == pytest.approx(0.04, rel=1e-4)
    assert (scales[torch.arange(64) != 3] == 1).all()


def test_nothing_is_scaled_where_all_vectors_are_zero() -> None:
    assert clip_scales(torch.zeros(4)).tolist() == [1, 1, 1, 1]
    assert len(outlier_rows(torch.zeros(4, 6), torch.zeros(4), torch.zeros(4))) == 0


def test_zeros_do_not_lower_the_limit() -> None:
    vectors = torch.zeros(100, 6)
    vectors[:10] = vectors_with_outliers()[10:20]
    assert (clip_scales(vectors.norm(dim=1)) == 1).all()


def test_the_mean_and_the_outliers_together_are_the_plain_moment() -> None:
    vectors, sums, rows = vectors_with_outliers(), TokenSums(torch.float64), OutlierRows()
    scales = sums.add("x", vectors, vectors.norm(dim=1))
    rows.add("x", outlier_rows(vectors, 1 - scales.square(), vectors.norm(dim=1)))
    outlier_sum = rows.product("x")
    assert outlier_sum is not None
    bulk = sums.sums["x"].triu()
    torch.testing.assert_close(
        bulk + outlier_sum.triu(), (vectors.T @ vectors).double().triu(), rtol=1e-5, atol=1e-3
    )
    # 62 vectors of norm 1 and one of norm 100, of which norm 4 is left
    assert float(bulk.diagonal().sum()) == pytest.approx(62 + 16, rel=1e-5)
    assert sums.outlier_share("x") == pytest.approx(1 - (62 + 16) / (62 + 1e4), rel=1e-5)
    assert sums.outlier_share("unknown") is None


def test_rows_are_limited_in_norm() -> None:
    vectors = vectors_with_outliers()
    rows = outlier_rows(vectors, torch.arange(64) * 1e12, vectors.norm(dim=1))
    assert len(rows) == 63
    limit = outliers.OUTLIER_NORM * outliers.MAX_ROW_NORM
    assert float(rows.norm(dim=1).max()) == pytest.approx(limit, rel=1e-4)


def test_many_rows_become_as_many_as_features() -> None:
    rows, parts = OutlierRows(), torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    for part in parts:
        rows.add("x", part)
    assert len(rows.rows["x"]) <= 12
    product, expected = rows.product("x"), parts.flatten(0, 1).double()
    assert product is not None
    torch.testing.assert_close(product, expected.T @ expected, rtol=1e-5, atol=1e-5)
    assert rows.product("y") is None


@contextmanager
def sink(model: Any) -> Iterator[None]:
    """Inside, the first token is an attention sink of the first block.

    down_proj's input is SINK times as large there, and so is the gradient of its output, although
    the norms behind a large output make the gradient as small.
    """
    mlp: Any = find_blocks(model)[1][0].mlp

    def scaled(values: Tensor, factor: float) -> Tensor:
        scale = torch.ones(values.shape[1], 1)
        scale[0] = factor
        return values * scale

    def scale_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        return scaled(arguments[0], SINK)

    def scale_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.detach() + scaled(output - output.detach(), SINK**2)

    handles = [
        mlp.down_proj.register_forward_pre_hook(scale_input),
        mlp.register_forward_hook(scale_gradient),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Calibration:
    """The moments and probes' costs of a model on fixed tokens."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokens = model, tokens(64, 64)
        self.tokens[:, 0] = 0  # every sample begins with the same token

    def moments(self, gradients: bool) -> Any:
        return measure_moments(self.model, select(self.model), self.tokens[:58], 58)

    def errors(self, probes: Any) -> dict[str, list[float]]:
        return measure_errors(self.model, probes, self.tokens)


def factors_with_a_sink(method: str) -> list[float]:
    """Measured over estimated cost of the probe in each block."""
    model = tiny_model()
    settings = FactorizeSettings(keep_ratio=0.7, method=method)
    with sink(model):
        prepared = prepare(model, select(model), settings, 0.7, Calibration(model), silent)
    return [candidates.factor for candidates in prepared.candidates]


@pytest.mark.parametrize("method", ["auto", "nystrom", "fisher"])
def test_estimates_hold_on_a_model_with_a_sink(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = factors_with_a_sink(method)
    assert all(1 / 3 < factor < 3 for factor in factors), factors
    monkeypatch.setattr(outliers, "OUTLIER_NORM", 1e30)  # plain means
    first_block, _ = factors_with_a_sink(method)
    assert not 1 / 30 < first_block < 30


def test_no_token_counts_for_less_because_its_gradient_is_clipped() -> None:
    """tr(G) tr(X) of one token, with its outlier row, is ‖g‖² ‖x‖²."""
    model, linears = tiny_model(), select(tiny_model())
    down = next(spec for spec in linears if spec.role == "down")
    with sink(model):
        statistics = measure_moments(model, linears, tokens(1, 32), 1).statistics(down)
    inputs, gradients = statistics.outlier_shares
    assert inputs is not None
    assert inputs > 0.999
    assert gradients is not None
    assert gradients > 0.999
    assert statistics.outlier_moment is not None
    # one direction, that of the sink
    energies = torch.linalg.eigvalsh(statistics.outlier_moment)
    assert float(energies[-1] / energies.sum()) == pytest.approx(1, abs=1e-6)


def test_whitening_reads_all_tokens() -> None:
    """Scaled-down tokens and their outlier rows make the plain second moment again."""
    vectors = vectors_with_outliers()
    scales = clip_scales(vectors.norm(dim=1))
    bulk = vectors * scales[:, None]
    rows = outlier_rows(vectors, 1 - scales.square(), vectors.norm(dim=1)).double()
    split = Statistics((bulk.T @ bulk).double(), outlier_moment=rows.T @ rows)
    plain = Statistics((vectors.T @ vectors).double())
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    method = WhitenedSVD(damping=1e-9)
    torch.testing.assert_close(
        method.error_curve(weight, split), method.error_curve(weight, plain), rtol=1e-3, atol=1e-2
    )


def test_a_sink_does_not_freeze_an_anchored_fit() -> None:
    """The ridge is relative to the energy of most tokens, not to that of one."""
    vectors = vectors_with_outliers()
    target, prior = torch.randn(3, 6), torch.zeros(3, 6)
    errors = []
    for sample in (vectors, vectors[torch.arange(64) != 3]):
        fit = RidgeFit("the input")
        fit.add(sample, sample @ target.T)
        weight = fit.weight(prior, damping=0.3)
        others = vectors[torch.arange(64) != 3].double()
        errors.append(float((others @ (weight - target.double()).T).square().mean()))
    with_sink, without_sink = errors
    assert with_sink < 1.5 * without_sink
