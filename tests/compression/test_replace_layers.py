"""New layers are exact, trainable where the dense ones were, and described by their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers
from tests.tiny import byte_tokenizer, logits, tiny_model

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48}


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_merge_is_exact_and_training_moves_every_part(form: str) -> None:
    model = tiny_model()
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method="fisher", form=form, **SETTINGS
    )
    for linear in result.linears:
        layer = model.get_submodule(linear.spec.name)
        if isinstance(layer, LowRankLinear):
            x = torch.randn(5, linear.spec.in_features)
            torch.testing.assert_close(layer.to_dense()(x), layer(x), rtol=1e-4, atol=1e-4)
            layer(x).sum().backward()
            assert all(p.grad is not None for p in layer.parameters())
            if form == "pivoted":
                assert linear.largest_coefficient is not None
                assert linear.largest_coefficient < 10


def test_spectrum_is_of_the_singular_values() -> None:
    model = tiny_model()
    dense = {name: weight.clone() for name, weight in model.named_parameters()}
    result = lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="svd", **SETTINGS)
    for linear in result.linears:
        numbers, values = zip(*linear.spectrum, strict=True)
        expected = torch.linalg.svdvals(dense[f"{linear.spec.name}.weight"])
        assert (numbers[0], numbers[-1]) == (1, len(expected))
        torch.testing.assert_close(
            torch.tensor(values), expected[torch.tensor(numbers) - 1], rtol=1e-3, atol=1e-5
        )


def test_zero_weight_survives_every_form() -> None:
    for method in ("svd", "fisher", "auto"):
        model = tiny_model()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
        lrcompress.factorize(
            model, byte_tokenizer(), keep_ratio=0.6, method=method, form="pivoted", **SETTINGS
        )
        assert bool(logits(model).isfinite().all())


def test_trained_flag_and_mode_are_inherited() -> None:
    model = tiny_model().train()
    model.requires_grad_(False)
    lrcompress.factorize(model, byte_tokenizer(), rank=8, **SETTINGS)
    assert model.training
    for _, layer in compressed_layers(model):
        assert layer.training
        assert not any(parameter.requires_grad for parameter in layer.parameters())
