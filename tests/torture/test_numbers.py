"""Moments and models that make others divide by nothing: finite, sensible, exact at full rank."""

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
each_method = pytest.mark.parametrize("method", METHODS)


def _gram(rows: int, features: int, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(rows, features, dtype=torch.float64, generator=_seeded(features))
    return x.T @ x / rows


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _constant(features: int) -> Tensor:
    """Of inputs whose third channel is 5 in every token, and whose fourth is 0."""
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
    """The moment of the inputs, and its like of the gradients."""
    return Statistics(MOMENTS[moment](into), MOMENTS[moment](out))


def _ffn(moment: str) -> FFN:
    """Width 16 to 24 channels and back, with `moment` at every linear."""
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


def _truncates(method: str) -> None:
    if not METHODS[method].truncates:
        pytest.skip("it leaves linears at full rank")


@each_moment
@each_method
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)], ids=str)
def test_truncation(method: str, moment: str, shape: tuple[int, int], tally: Tally) -> None:
    _truncates(method)
    made, statistics = METHODS[method], _statistics(moment, *shape)
    weight = torch.randn(shape, generator=_seeded(1), dtype=torch.float64)
    full = factors_of(made, weight, statistics, min(shape))
    torch.testing.assert_close(full.B @ full.A, weight, rtol=1e-5, atol=1e-5)
    curve = made.error_curve(weight, statistics)
    assert bool(curve.isfinite().all())
    assert bool((curve.diff() <= 0).all())
    for rank in (1, 5, 15):
        own = factors_of(made, weight, statistics, rank)
        plain = factors_of(PlainSVD(), weight, statistics, rank)
        assert bool(own.A.isfinite().all() and own.B.isfinite().all())
        # no farther off than the nearest matrix of the rank, in the metric of the method
        errors = [measured_error(made, statistics, weight - f.B @ f.A) for f in (own, plain)]
        least = 1e-9 * measured_error(made, statistics, weight)
        assert errors[0] <= errors[1] * (1 + 1e-6) + least
        # and of the size of the weight, whatever the size of the moment
        assert float((own.B @ own.A).norm()) <= 100 * float(weight.norm())
        _stored(own.A, own.B, shape, rank)
    tally("moments factorized", 3)


def _stored(A: Tensor, B: Tensor, shape: tuple[int, int], rank: int) -> None:
    """Both forms give the product of the factors, in float32."""
    x = torch.randn(7, shape[1], generator=_seeded(2))
    expected = x.double() @ (B @ A).T
    for form in FORMS.values():
        layer = form(shape[1], shape[0], rank, False)
        fill(layer, A, B)
        with torch.no_grad():
            found = layer(x).double()
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size + 1e-30)


@each_moment
@each_method
def test_narrowing(method: str, moment: str, tally: Tally) -> None:
    made, ffn = METHODS[method], _ffn(moment)
    if not made.narrows:
        pytest.skip("it keeps all channels")
    order = made.order(ffn)
    assert sorted(order.channels.tolist()) == list(range(OUT))
    assert bool(order.errors.isfinite().all())
    assert bool((order.errors.diff() <= 0).all())
    whole = made.narrow(ffn, torch.arange(OUT))
    torch.testing.assert_close(whole.weights["down"].float(), ffn.weights["down"])
    C, W = ffn.statistics["down"].second_moment, ffn.weights["down"].double()
    assert C is not None
    for width in (1, 8, 23):
        kept = order.channels[:width]
        left = made.narrow(ffn, kept).weights["down"]
        assert bool(left.isfinite().all())
        folded, dropped = torch.zeros_like(W), torch.zeros_like(W)
        folded[:, kept], dropped[:, kept] = left, W[:, kept]
        # reconstruction is no worse than leaving the other channels out
        errors = [float(((W - V) @ C * (W - V)).sum()) for V in (folded, dropped)]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-9 * float((W @ C * W).sum().abs())
    tally("moments narrowed", 3)


@each_moment
@each_method
@pytest.mark.parametrize("policy", ["loss_aware", "uniform"])
def test_budgets_are_met(method: str, moment: str, policy: str) -> None:
    from lrcompress.methods.plan import Budget
    from lrcompress.methods.registry import ALLOCATORS

    allocator = pkgutil.resolve_name(ALLOCATORS[policy])()
    choices, _ = list_candidates(_ffn(moment), METHODS[method], CandidateGrid("pivoted", 1), True)
    plan = allocator.allocate([choices], Budget(keep_ratio=0.6))
    kept = sum(plan.parameters(spec, "pivoted") for spec in choices.linears)
    # the share asked for, or less where the rest is estimated to be worth nothing at all
    assert kept <= 0.65 * choices.dense_parameters
    if moment in ("plain", "zero", "huge", "tiny"):
        assert kept >= 0.55 * choices.dense_parameters


CASES: dict[str, dict[str, Any]] = {
    "one sample": {"num_samples": 1, "seq_len": 64},
    "fewer tokens than features": {"num_samples": 1, "seq_len": 8},
    "zero inputs": {"num_samples": 2, "seq_len": 32},
    "tiny inputs": {"num_samples": 2, "seq_len": 32},
    "constant channel": {"num_samples": 2, "seq_len": 32},
    "dead channels": {"num_samples": 2, "seq_len": 32},
}


def _spoilt(case: str) -> Any:
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
    """From text to a model: finite, of the size asked for, and near where it was measured."""
    settings = CASES[case] | {"calibration": "pydoc", "gradient_samples": 1, "rank_multiple": 4}
    model = _spoilt(case)
    done = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method=method, form=form, **settings
    )
    assert 0.5 <= done.selected.keep_ratio <= 0.65
    assert bool(logits(model).isfinite().all())
    for _, layer in compressed_layers(model):
        assert all(bool(p.isfinite().all()) for p in layer.parameters())
    if case in ("zero inputs", "tiny inputs"):  # the FFNs add nothing, before and after
        torch.testing.assert_close(logits(model), logits(_spoilt(case)), rtol=1e-4, atol=1e-4)
    tally("spoilt models factorized", 1)


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
        done = lrcompress.factorize(model, byte_tokenizer(), **settings)
        assert any("float16" in note for note in done.notes) == (dtype == torch.float16)
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
    done = lrcompress.factorize(
        model, byte_tokenizer(), target_size=int(0.85 * size), rank_multiple=2, **settings
    )
    assert done.model.kept == pytest.approx(0.85 * done.model.dense, rel=0.02)
