"""Costs of forms: the line through two timings, and choices by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.benchmark import form_costs
from lrcompress.benchmark.form_costs import measure_costs
from lrcompress.methods.candidates import CandidateGrid
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.progress import silent
from tests.tiny import byte_tokenizer, tiny_model

UP = LinearSpec("0.up", 0, "up", 64, 256, False, "0", "0")
DOWN = LinearSpec("0.down", 0, "down", 256, 64, False, "0.down", "0")
GRID = CandidateGrid("pivoted", 8)
FLOAT32 = torch.empty(0)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    """Every timing takes `seconds` for its form, plus as much as its share of a dense linear."""

    def run(passes: Mapping[str, Any], repeats: int, *_: object) -> dict[str, list[float]]:
        def time(label: str) -> float:
            form, share = label.strip("()").split(", ")
            return seconds.get(form.strip("'"), 0.0) + float(share)

        return {label: [time(label), time(label), 9.0] for label in passes}

    monkeypatch.setattr(form_costs, "run_alternating", run)


def test_a_cost_is_its_time_in_parameters_of_the_dense_linear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, {"pivoted": 0.3})
    measured = measure_costs([UP, DOWN], GRID, FLOAT32, silent)
    dense = 64 * 256
    for spec in (UP, DOWN):
        narrowed = measured.costs.of(spec.name, "narrowed", dense // 2)
        assert narrowed == pytest.approx(dense / 2, rel=0.05)
        pivoted = measured.costs.of(spec.name, "pivoted", dense // 2)
        assert pivoted == pytest.approx(0.8 * dense, rel=0.05)
    assert "256 x 64 narrowed 0.40 and 0.80, pivoted 0.70 and 1.10" in measured.sentence
    assert "in float32 on cpu" in measured.sentence


def test_forms_are_really_timed() -> None:
    measured = measure_costs([UP, DOWN], GRID, FLOAT32, silent)
    for spec in (UP, DOWN):
        small, large = (measured.costs.of(spec.name, "pivoted", n) for n in (4_000, 14_000))
        assert 0 < small <= large


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_slower_than_dense_is_not_chosen(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "keep_ratio": 0.6, "method": "fisher", "num_samples": 4, "seq_len": 48,
        "calibration": ["pydoc"], "objective": "speed", "rank_multiple": 1,
    }  # fmt: skip
    pretend(monkeypatch, {"pivoted": 0.5})
    result = lrcompress.factorize(tiny_model(family), byte_tokenizer(), **settings)
    shares = [r.parameters / r.spec.dense_parameters for r in result.linears if r.rank]
    assert shares
    assert max(shares) < 0.55  # of 0.5 + share < 1
    assert result.selected.keep_ratio == pytest.approx(0.6, abs=0.02)
    assert any("time for one token over dense" in note for note in result.notes)
    pretend(monkeypatch, {"pivoted": 5.0})
    with pytest.raises(lrcompress.InputError, match="no form is faster than dense"):
        lrcompress.factorize(tiny_model(family), byte_tokenizer(), **settings)
    result = lrcompress.factorize(
        tiny_model(family), byte_tokenizer(), **(settings | {"method": "auto", "rank_multiple": 8})
    )
    assert {linear.form for linear in result.linears} <= {"narrowed", None}


def test_speed_needs_a_policy_that_weighs() -> None:
    with pytest.raises(lrcompress.InputError, match="objective speed does not go with uniform"):
        lrcompress.factorize(tiny_model(), method="svd", keep_ratio=0.5, objective="speed")
