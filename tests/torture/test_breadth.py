"""Every family in every form: factorized, saved, loaded, run, trained and exported as dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.checkpoint.export.dense import export_dense
from lrcompress.layers.ffn_layouts import ffn_parameters
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import parameter_count
from tests.tiny import FAMILIES, MIXTURES, MORE_MIXTURES, byte_tokenizer, logits, tiny_model, tokens
from tests.torture.conftest import Tally, Times

ALL_FAMILIES = [*FAMILIES, *MIXTURES, *MORE_MIXTURES]
SAMPLE = ["openai-gpt", "lfm2", "mixtral"]
# name of a form -> settings that give it
FORMS: dict[str, dict[str, Any]] = {
    "factored": {"method": "whitened", "form": "factored"},
    "pivoted": {"method": "fisher", "form": "pivoted"},
    "narrowed": {"method": "nystrom"},
    "mixed": {"method": "auto"},
}
SETTINGS: dict[str, Any] = {"keep_ratio": 0.6, "num_samples": 4, "seq_len": 48, "rank_multiple": 2}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_in_every_form(
    family: str, times: Times, tally: Tally, tmp_path: Path
) -> None:
    if not times(1, family in SAMPLE):
        pytest.skip("runs with --full only")
    for form, settings in FORMS.items():
        model = tiny_model(family)
        result = lrcompress.factorize(model, byte_tokenizer(), **settings, **SETTINGS)
        forms = {linear.form for linear in result.linears} - {None}
        assert forms == {form} if form != "mixed" else forms <= {"pivoted", "narrowed"}
        assert result.model.kept == parameter_count(model)
        assert result.ffn.kept == ffn_parameters(model)
        check(model, tmp_path / form)
    tally("families passed", 1)
    tally("family-form pairs passed", len(FORMS))


def check(model: Any, folder: Path) -> None:
    """Saves, loads, runs, exports and trains `model`, which is compressed."""
    lrcompress.save(model, folder / "saved", byte_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert dict(compressed_layers(loaded)).keys() == dict(compressed_layers(model)).keys()
    expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(generated(loaded), generated(model))
    check_export(loaded, folder, expected)
    check_training(model)


def generated(model: Any) -> torch.Tensor:
    sequences: torch.Tensor = model.generate(tokens(1, 8), max_new_tokens=6, do_sample=False)
    assert sequences.shape[1] > 8
    return sequences


def check_export(model: Any, folder: Path, expected: torch.Tensor) -> None:
    export_dense(model, byte_tokenizer(), folder / "dense", {})
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert not any(compressed_layers(dense))
    # products of factors are rounded once, their sums in another order
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)


def check_training(model: Any) -> None:
    """One small step against the gradient lowers the loss on the same batch, by every layer."""
    batch = tokens()
    trained = [p for _, layer in compressed_layers(model) for p in layer.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    before = model(input_ids=batch, labels=batch).loss
    before.backward()
    gradients = [p.grad for p in trained]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
    size = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
    with torch.no_grad():
        for parameter in trained:
            assert parameter.grad is not None
            parameter.sub_(1e-4 / size * parameter.grad)
        after = model(input_ids=batch, labels=batch).loss
    assert float(after) < float(before.detach())
