"""Anchored fits: exact where nothing is lost, no worse in what they minimise, safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.compression.anchored import AnchoredWalk, RidgeFit
from lrcompress.layers.lowrank import compressed_layers
from tests.tiny import byte_tokenizer, logits, tiny_model

SETTINGS: dict[str, Any] = {"num_samples": 16, "seq_len": 64, "sequential": "anchored"}
FAMILIES = ["llama", "phi3", "gpt2", "openai-gpt", "opt", "gemma2", "falcon", "gpt_neox", "mpt"]


def test_fit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    fit = RidgeFit("the input")
    fit.add(x[:100], x[:100] @ weight.T)
    fit.add(x[100:], x[100:] @ weight.T)
    torch.testing.assert_close(fit.weight(torch.zeros(4, 6), 1e-9).float(), weight)
    assert float((fit.weight(weight * 2, 1e6).float() - weight * 2).abs().max()) < 1e-3
    torch.testing.assert_close(fit.second_moment().float(), x.T @ x / 200)


def test_the_pull_towards_the_weights_is_by_each_inputs_own_size() -> None:
    """A unit of an input changes its weights by that unit; silent inputs keep theirs."""
    generator = torch.Generator().manual_seed(0)
    x, targets = (torch.randn(50, width, generator=generator) for width in (6, 4))
    x[:, 5] = 0
    units = torch.tensor([0.1, 1.0, 10.0, 5.0, 0.5, 1.0])
    prior = torch.randn(4, 6, generator=generator)
    plain, scaled = RidgeFit("x"), RidgeFit("x")
    plain.add(x, targets)
    scaled.add(x * units, targets)
    weight = plain.weight(prior, 0.3)
    rescaled = scaled.weight(prior / units, 0.3) * units
    torch.testing.assert_close(rescaled, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight[:, 5].float(), prior[:, 5])
    silent = RidgeFit("x")
    silent.add(torch.zeros(50, 6), targets)
    torch.testing.assert_close(silent.weight(prior, 0.3).float(), prior)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["auto", "whitened"])
def test_closer_to_the_dense_model_on_the_calibration_text(family: str, method: str) -> None:
    errors = {}
    expected = logits(tiny_model(family))
    for sequential in ("independent", "anchored"):
        model = tiny_model(family)
        settings = SETTINGS | {"sequential": sequential, "rank_multiple": 2}
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method=method, **settings)
        errors[sequential] = float((logits(model) - expected).norm())
    assert errors["anchored"] < 1.1 * errors["independent"]


def test_failure_puts_the_dense_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before, calls = logits(model), []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = AnchoredWalk._fit_down
    monkeypatch.setattr(AnchoredWalk, "_fit_down", breaks)
    with pytest.raises(KeyboardInterrupt):
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.5, method="nystrom", **SETTINGS)
    assert not any(compressed_layers(model))
    assert torch.equal(logits(model), before)


def test_anchoring_text_is_on_record_even_where_the_method_reads_none() -> None:
    model = tiny_model()
    result = lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="svd", **SETTINGS)
    assert result.calibration is not None
    assert result.calibration.tokens == 16 * 64
