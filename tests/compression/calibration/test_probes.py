"""Probes measure what a change costs; their factors correct the estimates of their block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.compression.calibration.moments import measure_errors, measure_moments
from lrcompress.compression.calibration.probes import Probe, corrected
from lrcompress.compression.planning import Planning, ffns_of, prepare
from lrcompress.compression.serving import Serving
from lrcompress.config import FactorizeSettings
from lrcompress.layers.block_runner import sample_score_gradients
from lrcompress.layers.ffn_layouts import select
from lrcompress.methods.allocators.loss_aware import LossAware
from lrcompress.methods.auto import Auto
from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.plan import Budget, Candidates, RankCurve, WidthOption
from lrcompress.methods.svd import FisherSVD
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.progress import silent
from tests.tiny import byte_tokenizer, tiny_model, tokens


def down_of(model: torch.nn.Module, block: int) -> LinearSpec:
    down: LinearSpec = next(s for s in select(model) if s.block == block and s.role == "down")
    return down


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_errors_are_means_over_tokens(family: str) -> None:
    model, sample = tiny_model(family), tokens(23, 20)
    down = down_of(model, 0)
    change = 0.1 * torch.randn(down.out_features, down.in_features)
    errors = measure_errors(model, [Probe(down, change, 1.0)], sample)
    module, seen = model.get_submodule(down.name), []
    module.register_forward_hook(lambda _, x, y: seen.append((x[0].flatten(0, -2), y)))
    expected = []
    for seed in (21, 22):  # an eighth
        seen.clear()
        generator = torch.Generator().manual_seed(seed)
        logits = model(input_ids=sample[seed : seed + 1]).logits[0]
        h, output = seen[0]
        g = torch.autograd.grad(logits, output, sample_score_gradients(logits.detach(), generator))[
            0
        ]
        products = (g.flatten(0, -2) * (h.detach() @ change.T)).sum(-1)
        expected.append(float(products.square().mean()))
    assert errors == {down.name: pytest.approx(expected, rel=1e-4)}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_error_is_twice_the_divergence_of_a_small_change() -> None:
    """In the last block, behind which no token reads another."""
    model, sample = tiny_model(), tokens(48, 64)
    down = down_of(model, 1)
    weight = model.get_submodule(down.name).weight
    generator = torch.Generator().manual_seed(0)
    change = 0.02 * weight.std().detach() * torch.randn(weight.shape, generator=generator)
    errors = measure_errors(model, [Probe(down, change, 1.0)], sample)
    sample = sample[-6:]
    with torch.no_grad():
        before = model(input_ids=sample).logits.double().log_softmax(-1)
        weight -= change
        after = model(input_ids=sample).logits.double().log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert sum(errors[down.name]) / 6 / 2 == pytest.approx(divergence, rel=0.3)


def candidates_of(block: int) -> Candidates:
    linear = LinearSpec(f"{block}.down", block, "down", 8, 4, False, "h", f"{block}")
    curve = RankCurve(linear.name, np.array([1, 0]), np.array([12, 32]), np.array([3.0, 0.0]))
    return Candidates(
        linear.ffn, (linear,), (WidthOption(None, 0.0, (curve,)), WidthOption(6, 2.0, ()))
    )


def test_a_factor_is_that_of_its_block() -> None:
    first, second, third = (candidates_of(block) for block in range(3))
    probes = [Probe(c.linears[0], torch.zeros(4, 8), 2.0) for c in (first, second)]
    measured = {"0.down": [2.5, 10.0], "1.down": [0.0, 0.0]}
    result = corrected([first, second, third], probes, measured)
    # the geometric mean; then nothing measured, and nothing probed
    assert [c.factor for c in result] == pytest.approx([2.5, 1.0, 1.0])
    assert [c.shapes for c in result] == [c.shapes for c in (first, second, third)]


def candidates_with_ranks(block: int, factor: float) -> Candidates:
    linear = LinearSpec(f"{block}.down", block, "down", 64, 64, False, "h", f"{block}")
    ranks = np.arange(1, 64)
    counts = [linear.parameters(int(rank), "pivoted") for rank in ranks]
    errors = np.exp(-ranks / 16) - np.exp(-4)
    curve = RankCurve(
        linear.name, np.append(ranks, 0), np.append(counts, 4096), np.append(errors, 0.0)
    )
    return Candidates(linear.ffn, (linear,), (WidthOption(None, 0.0, (curve,)),), factor)


@pytest.mark.parametrize(("keep_ratio", "moves"), [(0.9, True), (0.6, True), (0.4, False)])
def test_factors_count_less_the_less_is_kept(keep_ratio: float, moves: bool) -> None:
    candidates = [candidates_with_ranks(0, 3.0), candidates_with_ranks(1, 1.0)]
    ranks = LossAware().allocate(candidates, Budget(keep_ratio=keep_ratio)).ranks
    first, second = (ranks.get(f"{block}.down", 64) for block in (0, 1))
    assert first > second + 2 if moves else abs(first - second) <= 1


class FixedCosts:
    """A calibration in which every probe of block 0 costs `factor` times its estimate."""

    def __init__(self, model: torch.nn.Module, factor: float) -> None:
        self.model, self.factor = model, factor
        self.probes: list[Probe] = []

    def moments(self, gradients: bool):  # type: ignore[no-untyped-def]
        sample = tokens(4, 32)
        return measure_moments(self.model, select(self.model), sample, 4 * gradients)

    def errors(self, probes):  # type: ignore[no-untyped-def]
        self.probes = list(probes)
        return {
            probe.linear.name: [probe.estimated * (1.0 if probe.linear.block else self.factor)]
            for probe in probes
        }


@pytest.mark.parametrize("method", ["auto", "fisher", "nystrom"])
def test_what_costs_more_than_it_seemed_keeps_more(method: str) -> None:
    model = tiny_model()
    linears = select(model)
    settings = FactorizeSettings(keep_ratio=0.6, method=method, rank_multiple=1)
    parameters = []
    for factor in (1.0, 100.0):
        calibration = FixedCosts(model, factor)
        plan = prepare(model, linears, settings, 0.6, calibration, silent).plan
        assert plan is not None
        assert len(calibration.probes) == 2
        assert all(bool((probe.change != 0).any()) for probe in calibration.probes)
        parameters.append(sum(plan.parameters(s, settings.form) for s in linears if s.block == 0))
    assert parameters[1] > parameters[0]


def test_errors_in_another_unit_are_not_corrected() -> None:
    model = tiny_model()
    options = {"two_sided": False}
    settings = FactorizeSettings(
        keep_ratio=0.5, method="nystrom", method_options=options, ranks="loss_aware"
    )
    calibration = FixedCosts(model, 100.0)
    assert prepare(model, select(model), settings, 0.5, calibration, silent).plan is not None
    assert calibration.probes == []


@pytest.mark.parametrize("method", [Auto(), Nystrom(), FisherSVD()])
def test_the_estimate_is_that_of_the_change(method: Auto | Nystrom | FisherSVD) -> None:
    """In moments that are not shrunk, where the change costs tr(G D X Dᵀ)."""
    model = tiny_model()
    linears = select(model)
    name = {"Auto": "auto", "Nystrom": "nystrom", "FisherSVD": "fisher"}[type(method).__name__]
    options = {"shrinkage": 0, "output_shrinkage": 0}
    settings = FactorizeSettings(keep_ratio=0.5, method=name, method_options=options)
    planning = Planning.of(settings, 0.5, Serving.of(model, linears, settings, silent))
    moments = FixedCosts(model, 1.0).moments(True)
    candidates = planning.candidates(ffns_of(model, linears, moments))
    for probe in planning.probes(ffns_of(model, linears, moments), candidates):
        statistics = moments.statistics(probe.linear)
        assert statistics.gradient_moment is not None
        D = probe.change.double()
        cost = float(
            (statistics.gradient_moment.double() @ D @ statistics.second_moment @ D.T).trace()
        )
        assert probe.estimated == pytest.approx(cost, rel=0.05)


def test_what_probes_found_is_recorded() -> None:
    settings: dict[str, Any] = {
        "calibration": "pydoc:calibration",
        "seq_len": 32,
        "gradient_samples": 4,
    }
    factors = []
    for samples in (4, 16):  # too few to hold one out, and two held out
        model = tiny_model()
        result = lrcompress.factorize(
            model, byte_tokenizer(), keep_ratio=0.8, num_samples=samples, **settings
        )
        factors.append(result.to_dict()["probed"])
    assert factors[0] == {}
    assert factors[1].keys() == {spec.ffn for spec in select(tiny_model())}
    assert all(0 < factor < 100 for factor in factors[1].values())
