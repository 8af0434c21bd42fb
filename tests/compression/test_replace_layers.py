"""New layers are exact, trainable where the dense ones were, and described by their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.compression.replace_layers import LinearResult
from lrcompress.config import CalibrationSettings
from lrcompress.data.calibration_text import calibration_text
from lrcompress.layers.block_runner import sample_score_gradients
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers
from lrcompress.methods.types import OutlierShares
from tests.tiny import byte_tokenizer, logits, sink_model, tiny_model

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


TEXT: dict[str, Any] = {"num_samples": 9, "seq_len": 48, "gradient_samples": 2}


def _share(samples: list[torch.Tensor]) -> float:
    """Of Σ ‖v‖², what vectors (tokens, features) have above 4 times the median norm of a sample."""
    kept_energy = energy = 0.0
    for vectors in samples:
        norms = vectors.flatten(0, -2).double().norm(dim=1)
        kept_energy += float(norms.clamp(max=4 * float(norms[norms > 0].median())).square().sum())
        energy += float(norms.square().sum())
    return 1 - kept_energy / energy


def _expected_shares(model: Any, names: list[str]) -> dict[str, OutlierShares]:
    """Of the inputs on 8 samples and of the gradients on 2; one sample is held out."""
    settings = CalibrationSettings(data=["pydoc"], **TEXT)
    samples = calibration_text(model, byte_tokenizer(), settings).tokens
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, seen=inputs[name]: seen.append(x[0].detach()))
        module.register_full_backward_hook(lambda _, __, g, seen=gradients[name]: seen.append(g[0]))
    for index, sample in enumerate(samples[:8]):
        logits = model(input_ids=sample[None]).logits[0]
        if index < 2:
            generator = torch.Generator().manual_seed(index)
            logits.backward(sample_score_gradients(logits.detach(), generator))
    return {name: OutlierShares(_share(inputs[name]), _share(gradients[name])) for name in names}


@pytest.mark.parametrize("sequential", ["independent", "anchored"])
def test_every_linear_has_the_shares_of_its_outliers(sequential: str) -> None:
    """Dense linears too; those of the dense model, whatever the blocks in front have become."""
    model = sink_model(block=1)
    result = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.9, method="fisher", calibration="pydoc",
        sequential=sequential, **TEXT,
    )  # fmt: skip
    assert {linear.form for linear in result.linears} == {None, "pivoted"}
    expected = _expected_shares(
        sink_model(block=1), [linear.spec.name for linear in result.linears]
    )
    assert expected["model.layers.1.mlp.gate_proj"].inputs > 0.9  # type: ignore[operator]
    for linear in result.linears:
        assert linear.outlier_shares == pytest.approx(expected[linear.spec.name], abs=1e-5)
        assert LinearResult.from_dict(linear.to_dict(), linear.spec) == linear


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_shares_that_were_not_measured_are_none(method: str) -> None:
    result = lrcompress.factorize(
        sink_model(block=1), byte_tokenizer(), keep_ratio=0.6, method=method, calibration="pydoc",
        **TEXT,
    )  # fmt: skip
    for linear in result.linears:
        assert linear.to_dict()["gradient_outlier_share"] is None
        assert (linear.to_dict()["input_outlier_share"] is None) == (method == "svd")
