"""Degenerate moments and models: results are finite, as good as plain SVD, exact at full rank."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lrcompress
from lrcompress.compression.replace_layers import fill
from lrcompress.layers.lowrank import FORMS, compressed_layers
from lrcompress.methods import registry
from lrcompress.methods.candidates import CandidateGrid, list_candidates
from lrcompress.methods.svd import PlainSVD
from lrcompress.methods.types import FFN, LinearSpec, Statistics
from tests.methods.test_methods import factors_of, measured_error
from tests.tiny import byte_tokenizer, logits, tiny_model
from tests.torture.conftest import Tally

OUT, IN = 24, 16
METHODS = {name: pkgutil.resolve_name(home)() for name, home in registry.METHODS.items()}
TRUNCATING = [name for name, method in METHODS.items() if method.truncates]
NARROWING = [name for name, method in METHODS.items() if method.narrows]
METHODS_AND_POLICIES = [
    (name, policy)
    for name, method in METHODS.items()
    for policy in (["loss_aware", "uniform"] if method.estimates_errors else ["uniform"])
]
each_method = pytest.mark.parametrize("method", METHODS)


def _gram(rows: int, features: int, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(rows, features, dtype=torch.float64, generator=_seeded(features))
    return x.T @ x / rows


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _constant(features: int) -> Tensor:
    """The moment of inputs whose third channel is 5 in every token, and whose fourth is 0."""
    x = torch.randn(200, features, dtype=torch.float64, generator=_seeded(3))
    x[:, 2], x[:, 3] = 5.0, 0.0
    return x.T @ x / 200


MOMENTS: dict[str, Callable[[int], Tensor]] = {
    "plain": lambda n: _gram(400, n),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "one token": lambda n: _gram(1, n),
    "fewer tokens than features": lambda n: _gram(n // 2, n),
    "huge": lambda n: _gram(400, n) * 1e30,
    "tiny": lambda n: _gram(400, n) * 1e-30,
    "huge and tiny channels": lambda n: (
        _gram(400, n) * torch.outer(*[torch.logspace(15, -15, n, dtype=torch.float64)] * 2)
    ),
    "constant channel": _constant,
    "equal channels": lambda n: torch.ones(n, n, dtype=torch.float64),
    "indefinite by rounding": lambda n: _gram(2, n) - 1e-17 * torch.eye(n, dtype=torch.float64),
}
each_moment = pytest.mark.parametrize("moment", MOMENTS)


def _statistics(moment: str, out: int, into: int) -> Statistics:
    """The named moment, of inputs and of gradients."""
    return Statistics(MOMENTS[moment](into), MOMENTS[moment](out))


def _ffn(moment: str) -> FFN:
    """From 16 features to 24 channels and back, with `moment` at every linear."""
    shapes = {"gate": (OUT, IN), "up": (OUT, IN), "down": (IN, OUT)}
    specs = tuple(
        LinearSpec(role, 0, role, shape[1], shape[0], True, "in" if role != "down" else role, "ffn")  # type: ignore[arg-type]
        for role, shape in shapes.items()
    )
    draw = _seeded(0)
    weights = {n: torch.randn(shape, generator=draw) for n, shape in shapes.items()}
    biases = {n: torch.randn(shape[0], generator=draw) for n, shape in shapes.items()}
    statistics = {n: _statistics(moment, *shape) for n, shape in shapes.items()}
    return FFN("ffn", specs, weights, biases, statistics, True)


@each_moment
@pytest.mark.parametrize("method", TRUNCATING)
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_truncation(method: str, moment: str, shape: tuple[int, int], tally: Tally) -> None:
    factorizer, statistics = METHODS[method], _statistics(moment, *shape)
    weight = torch.randn(shape, generator=_seeded(1), dtype=torch.float64)
    full = factors_of(factorizer, weight, statistics, min(shape))
    torch.testing.assert_close(full.B @ full.A, weight, rtol=1e-5, atol=1e-5)
    curve = factorizer.error_curve(weight, statistics)
    assert bool(curve.isfinite().all())
    assert bool((curve.diff() <= 0).all())
    for rank in (1, 5, 15):
        factors = factors_of(factorizer, weight, statistics, rank)
        plain = factors_of(PlainSVD(), weight, statistics, rank)
        assert bool(factors.A.isfinite().all() and factors.B.isfinite().all())
        # no larger an error than that of plain SVD, in the metric of the method
        errors = [
            measured_error(factorizer, statistics, weight - f.B @ f.A) for f in (factors, plain)
        ]
        tolerance = 1e-9 * measured_error(factorizer, statistics, weight)
        assert errors[0] <= errors[1] * (1 + 1e-6) + tolerance
        # the product is of the size of the weight, whatever the size of the moment
        assert float((factors.B @ factors.A).norm()) <= 100 * float(weight.norm())
        _check_forms(factors.A, factors.B, shape, rank)
    tally("moments factorized", 3)


def _check_forms(A: Tensor, B: Tensor, shape: tuple[int, int], rank: int) -> None:
    """Layers of both forms compute the product of the factors, in float32."""
    x = torch.randn(7, shape[1], generator=_seeded(2))
    expected = x.double() @ (B @ A).T
    for form in FORMS.values():
        layer = form(shape[1], shape[0], rank, False)
        fill(layer, A, B)
        with torch.no_grad():
            output = layer(x).double()
        size = float(expected.abs().max())
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4 * size + 1e-30)


@each_moment
@pytest.mark.parametrize("method", NARROWING)
def test_narrowing(method: str, moment: str, tally: Tally) -> None:
    narrower, ffn = METHODS[method], _ffn(moment)
    order = narrower.order(ffn)
    assert sorted(order.channels.tolist()) == list(range(OUT))
    if narrower.estimates_errors:
        assert bool(order.errors.isfinite().all())
        assert bool((order.errors.diff() <= 0).all())
    whole = narrower.narrow(ffn, torch.arange(OUT))
    torch.testing.assert_close(whole.weights["down"].float(), ffn.weights["down"])
    C, W = ffn.statistics["down"].second_moment, ffn.weights["down"].double()
    assert C is not None
    for width in (1, 8, 23):
        channels = order.channels[:width]
        narrowed = narrower.narrow(ffn, channels).weights["down"].double()
        assert bool(narrowed.isfinite().all())
        folded, dropped = torch.zeros_like(W), torch.zeros_like(W)
        folded[:, channels], dropped[:, channels] = narrowed, W[:, channels]
        # reconstruction is no worse than dropping the other channels
        errors = [float(((W - V) @ C * (W - V)).sum()) for V in (folded, dropped)]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-9 * float((W @ C * W).sum().abs())
    tally("moments narrowed", 3)


@each_moment
@pytest.mark.parametrize(("method", "policy"), METHODS_AND_POLICIES)
def test_budgets_are_met(method: str, moment: str, policy: str) -> None:
    from lrcompress.methods.plan import Budget
    from lrcompress.methods.registry import ALLOCATORS

    allocator = pkgutil.resolve_name(ALLOCATORS[policy])()
    candidates, _ = list_candidates(
        _ffn(moment), METHODS[method], CandidateGrid("pivoted", 1), True
    )
    plan = allocator.allocate([candidates], Budget(keep_ratio=0.6))
    parameters = sum(plan.parameters(spec, "pivoted") for spec in candidates.linears)
    # the requested share, or less where further parameters are estimated to change nothing
    assert parameters <= 0.65 * candidates.dense_parameters
    if moment in ("plain", "zero", "huge", "tiny"):
        assert parameters >= 0.55 * candidates.dense_parameters


CASES: dict[str, dict[str, Any]] = {
    "one sample": {"num_samples": 1, "seq_len": 64},
    "fewer tokens than features": {"num_samples": 1, "seq_len": 8},
    "zero inputs": {"num_samples": 2, "seq_len": 32},
    "tiny inputs": {"num_samples": 2, "seq_len": 32},
    "constant channel": {"num_samples": 2, "seq_len": 32},
    "dead channels": {"num_samples": 2, "seq_len": 32},
}


def _degenerate(case: str) -> Any:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            norm, up = layer.post_attention_layernorm, layer.mlp.up_proj
            if case == "zero inputs":
                norm.weight.zero_()
            elif case == "tiny inputs":
                norm.weight.mul_(1e-15)
            elif case == "constant channel":
                norm.weight[3] = 0
            elif case == "dead channels":
                up.weight[10:60] = 0
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["factored", "pivoted"])
@each_method
def test_models(method: str, form: str, case: str, tally: Tally) -> None:
    """From text to a model: finite, and of the requested size."""
    settings = CASES[case] | {"calibration": "pydoc", "gradient_samples": 1, "rank_multiple": 4}
    model = _degenerate(case)
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method=method, form=form, **settings
    )
    assert 0.5 <= result.selected.keep_ratio <= 0.65
    assert bool(logits(model).isfinite().all())
    for _, layer in compressed_layers(model):
        assert all(bool(p.isfinite().all()) for p in layer.parameters())
    if case in ("zero inputs", "tiny inputs"):  # the FFNs add nothing, before and after
        torch.testing.assert_close(logits(model), logits(_degenerate(case)), rtol=1e-4, atol=1e-4)
    tally("degenerate models factorized", 1)


def _overflowing(dtype: torch.dtype) -> Any:
    """Activations of 1e5 are infinite in float16; in float32 the model is an ordinary one."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(500)
            layer.mlp.down_proj.weight.mul_(1e-3)
    return model.to(torch.float16).to(dtype)


@pytest.mark.parametrize("method", ["whitened", "auto"])
@pytest.mark.parametrize("calibration", ["pydoc", "self"])
@pytest.mark.parametrize("sequential", ["independent", "anchored"])
def test_float16_that_overflows_is_calibrated_in_float32(
    method: str, calibration: str, sequential: str
) -> None:
    """The result is that of the same weights in float32, rounded."""
    settings: dict[str, Any] = {
        "keep_ratio": 0.6, "method": method, "calibration": calibration, "num_samples": 2,
        "seq_len": 32, "sequential": sequential,
    }  # fmt: skip
    models = []
    for dtype in (torch.float16, torch.float32):
        model = _overflowing(dtype)
        before = {name: p.clone() for name, p in model.named_parameters() if "mlp" not in name}
        result = lrcompress.factorize(model, byte_tokenizer(), **settings)
        assert any("float16" in note for note in result.notes) == (dtype == torch.float16)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        models.append(model)
    assert bool(logits(models[0].float()).isfinite().all())
    torch.testing.assert_close(
        logits(models[0].float()),
        logits(models[1]),
        rtol=0.05,
        atol=0.05 * float(logits(models[1]).std()),
    )


def test_bytes_are_those_of_the_model_that_was_given() -> None:
    settings: dict[str, Any] = {"num_samples": 2, "seq_len": 32}
    model = _overflowing(torch.float16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    result = lrcompress.factorize(
        model, byte_tokenizer(), target_size=int(0.85 * size), rank_multiple=2, **settings
    )
    assert result.model.kept == pytest.approx(0.85 * result.model.dense, rel=0.02)
