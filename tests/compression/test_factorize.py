"""`lrcompress.factorize` from Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.layers.ffn_layouts import find_ffns, select
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, logits, tiny_model

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48}


def test_whitened_beats_svd_on_the_calibration_outputs() -> None:
    errors = {}
    expected = logits(tiny_model())
    for method in ("svd", "whitened"):
        model = tiny_model()
        lrcompress.factorize(model, byte_tokenizer(), rank=12, method=method, **SETTINGS)
        errors[method] = float((logits(model) - expected).norm())
    assert errors["whitened"] < errors["svd"]


def test_equal_seeds_give_equal_models() -> None:
    models = [tiny_model(), tiny_model()]
    for model in models:
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, **SETTINGS)
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_effort_gives_the_model_of_its_settings() -> None:
    models = [tiny_model(), tiny_model(), tiny_model()]
    chosen: dict[str, Any] = {"sequential": "anchored", "gradient_samples": 16}
    efforts: list[dict[str, Any]] = [{"effort": "best"}, chosen, {}]
    for model, settings in zip(models, efforts, strict=True):
        same: dict[str, Any] = {"keep_ratio": 0.6, "rank_multiple": 2, "num_samples": 20}
        lrcompress.factorize(model, byte_tokenizer(), **SETTINGS | same | settings)
    best, explicit, default = map(logits, models)
    assert torch.equal(best, explicit)
    assert not torch.equal(best, default)


def test_patterns_choose_linears() -> None:
    model = tiny_model()
    result = lrcompress.factorize(
        model, rank=8, method="svd", exclude=["*.gate_proj"], dense_first=1
    )
    names = [name for name, _ in compressed_layers(model)]
    assert names == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert result.selected.dense == 2 * 32 * 88
    assert result.ffn.dense == 6 * 32 * 88
    assert result.ffn.kept == 4 * 32 * 88 + 2 * 8 * (32 + 88)


def test_include_reaches_beyond_the_known_ffns() -> None:
    model = tiny_model()
    specs = select(model, include=["*.self_attn.q_proj", "*.0.mlp.up_proj"])
    assert [spec.name for spec in specs] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    lrcompress.factorize(
        model, byte_tokenizer(), rank=4, include=["*.self_attn.q_proj"], **SETTINGS
    )
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankLinear)


def test_unknown_family_is_refused_with_the_remedy() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.strange = layer.mlp.up_proj
        del layer.mlp.up_proj, layer.mlp.gate_proj
    with pytest.raises(InputError, match="name them with --include"):
        select(model)
    result = lrcompress.factorize(model, rank=8, method="svd", include=["*.strange"])
    assert [linear.spec.name for linear in result.linears] == [
        "model.layers.0.mlp.strange",
        "model.layers.1.mlp.strange",
    ]
    assert result.selected.kept == 2 * 8 * (32 + 88)
    assert result.ffn.dense == 0  # not known to be FFNs


def test_refused_settings_leave_the_model_as_it_was() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    for settings in ({"rank": 99}, {"keep_ratio": 2}, {"rank": 4, "methodd": "svd"}, {}):
        with pytest.raises(InputError):
            lrcompress.factorize(model, byte_tokenizer(), **settings)
    with pytest.raises(InputError, match="has no tokenizer"):
        lrcompress.factorize(model, rank=4)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }


def test_unknown_keyword_gets_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean 'keep_ratio'"):
        lrcompress.factorize(tiny_model(), keep_ration=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_stay_in_their_dtype(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, **SETTINGS)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert bool(logits(model).isfinite().all())


def test_low_rank_model_is_found_again() -> None:
    model = tiny_model("gpt2")
    before = find_ffns(model)
    lrcompress.factorize(model, rank=8, method="svd")
    assert find_ffns(model) == before


def test_streaming_a_model_in_memory_is_refused() -> None:
    with pytest.raises(InputError, match="use `lrcompress factorize`"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), keep_ratio=0.6, streaming=True)
