"""The choice of channels: exact errors, and as good as the plain greedy loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrcompress.methods.auto import Auto
from lrcompress.methods.channel_selection import fold_into_down, order_channels
from lrcompress.methods.linalg import shrunk
from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.types import FFN, LinearSpec, Role, Statistics


def moments(width: int, out: int, samples: int = 2000) -> tuple[Tensor, Tensor]:
    """A second moment of correlated channels, and the root (out, width) of a metric."""
    generator = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    h = h * torch.logspace(0, -2, width, dtype=torch.float64) @ mix
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return h.T @ h / samples, weight


def measured(C: Tensor, root: Tensor, channels: Tensor) -> float:
    """tr(rootᵀ root D), D the residual after reconstruction from `channels`, computed directly."""
    fold = torch.zeros_like(C)
    fold[:, channels] = fold_into_down(torch.eye(len(C)), C, channels, 1e-14)
    rest = torch.eye(len(C), dtype=C.dtype) - fold
    return float((root @ rest @ C @ rest.T @ root.T).trace())


@pytest.mark.parametrize("width", [20, 150, 300])
def test_errors_are_those_of_the_channels(width: int) -> None:
    C, root = moments(width, 16)
    order = order_channels(C, root)
    assert sorted(order.channels.tolist()) == list(range(width))
    assert order.errors.shape == (width + 1,)
    assert bool((order.errors.diff() <= 0).all())
    assert float(order.errors[0]) == pytest.approx(float((root @ C @ root.T).trace()))
    assert order.errors[-1] == 0
    for count in (1, width // 3, width - 2):
        expected = measured(C, root, order.channels[:count])
        assert float(order.errors[count]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def tiny_ffn(width: int, out: int, role: Role = "up") -> FFN:
    generator = torch.Generator().manual_seed(1)
    rows = 2 * width if role == "gate_up" else width
    up = LinearSpec("up", 0, role, out, rows, False, "x", "ffn")
    down = LinearSpec("down", 0, "down", width, out, False, "h", "ffn")
    g = torch.randn(500, out, generator=generator, dtype=torch.float64)
    g = g @ torch.randn(out, out, generator=generator, dtype=torch.float64)
    measured = {
        "up": Statistics(torch.eye(out).double(), torch.eye(rows).double()),
        "down": Statistics(moments(width, out)[0], g.T @ g / 500),
    }
    shapes = {"up": (rows, out), "down": (out, width)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return FFN("ffn", (up, down), weights, {"up": None, "down": None}, measured, True)


@pytest.mark.parametrize("kind", [Nystrom, Auto])
@pytest.mark.parametrize(("shrinkage", "output_shrinkage"), [(0.0, 0.0), (0.1, 0.6), (1.0, 1.0)])
def test_the_estimated_error_of_an_ffn_is_the_measured_one(
    kind: type[Nystrom | Auto], shrinkage: float, output_shrinkage: float
) -> None:
    """Order and reconstruction are of the same shrunk moments."""
    ffn = tiny_ffn(24, 8)
    method = kind(shrinkage=shrinkage, output_shrinkage=output_shrinkage)
    order, down = method.order(ffn), ffn.statistics["down"]
    X, G = down.second_moment, down.gradient_moment
    assert X is not None
    assert G is not None
    for count in (5, 12, 20):
        channels = order.channels[:count]
        rest = ffn.weights["down"].double()
        rest[:, channels] -= method.narrow(ffn, channels).weights["down"]
        error = shrunk(G, output_shrinkage) @ rest @ shrunk(X, shrinkage) @ rest.T
        assert float(order.errors[count]) == pytest.approx(float(error.trace()), rel=1e-3)


def test_as_good_as_the_plain_greedy_loop() -> None:
    C, root = moments(150, 16)
    M = root.T @ root
    chosen: list[int] = []
    D = C.clone()
    for _ in range(60):
        gains = ((D @ M) * D).sum(1) / D.diagonal().clamp_min(1e-30)
        gains[chosen] = -1
        j = int(gains.argmax())
        chosen.append(j)
        D = D - torch.outer(D[:, j], D[j]) / D[j, j]
    plain = float((M * D).sum())
    assert float(order_channels(C, root).errors[60]) <= 1.02 * plain


def test_channels_that_copy_others_come_last_and_cost_nothing() -> None:
    C, root = moments(30, 8)
    twice = torch.cat([torch.cat([C, C], 1), torch.cat([C, C], 1)])
    order = order_channels(twice, torch.cat([root, root], 1))
    assert len({int(c) % 30 for c in order.channels[:30]}) == 30
    assert float(order.errors[30]) <= 1e-6 * float(order.errors[0])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_degenerate_moments_are_ordered(scale: float) -> None:
    C, root = moments(20, 8)
    order = order_channels(C * scale, root)
    assert sorted(order.channels.tolist()) == list(range(20))
    assert bool(order.errors.isfinite().all())


def test_constant_and_silent_channels() -> None:
    C, root = moments(20, 8)
    C[3], C[:, 3] = 0, 0
    order = order_channels(C, root)
    assert int(order.channels[-1]) == 3
    fold = fold_into_down(torch.eye(len(C)), C, order.channels[:10], 1e-6)
    assert bool(fold.isfinite().all())


def test_grams_are_those_of_the_folded_weight() -> None:
    C, root = moments(150, 16)
    order = order_channels(C, root, widths={20, 75, 110})
    assert set(order.grams) == {20, 75, 110}
    for width, gram in order.grams.items():
        channels = order.channels[:width]
        folded = fold_into_down(root, C, channels, 1e-14)
        expected = folded @ C[channels][:, channels] @ folded.T
        torch.testing.assert_close(gram, expected, rtol=1e-8, atol=1e-8)
        lost = float(order.errors[0]) - float(gram.trace())
        assert float(order.errors[width]) == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize(("role", "hidden"), [("up", 8), ("gate_up", 8), ("up", 40)])
def test_curves_at_narrower_widths_are_those_of_the_narrowed_ffn(role: Role, hidden: int) -> None:
    """Products that all widths share differ from those of each by small dampings alone."""
    ffn, method = tiny_ffn(24, hidden, role), Auto(shrinkage=0.2, output_shrinkage=0.6)
    order = method.order(ffn, widths={4, 8, 16})
    curves = method.narrowed_curves(ffn, order, {4, 8, 16})
    for width in (4, 8, 16):
        narrowed = method.narrow(ffn, order.channels[:width])
        for linear in narrowed.linears:
            expected = method.error_curve(
                narrowed.weights[linear.name], narrowed.statistics[linear.name]
            )
            curve = curves[width][linear.name]
            assert len(curve) == linear.full_rank + 1
            torch.testing.assert_close(curve, expected, rtol=0.05, atol=0.01 * float(expected[0]))
    assert bool(order.grams) == (hidden < 24)
    if hidden > 24:  # nothing is shared, so nothing is there for nothing
        assert 24 not in curves
        return
    full = method.error_curve(ffn.weights["up"], ffn.statistics["up"])
    torch.testing.assert_close(curves[24]["up"], full, rtol=1e-4, atol=1e-5 * float(full[0]))
