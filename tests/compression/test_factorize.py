"""`lrcompress.factorize` from Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.layers.ffn_layouts import find_ffns, select
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers
from lrcompress.methods import linalg, svd
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


def test_patterns_choose_linears() -> None:
    model = tiny_model()
    done = lrcompress.factorize(model, rank=8, method="svd", exclude=["*.gate_proj"], dense_first=1)
    names = [name for name, _ in compressed_layers(model)]
    assert names == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert done.selected.dense == 2 * 32 * 88
    assert done.ffn.dense == 6 * 32 * 88
    assert done.ffn.kept == 4 * 32 * 88 + 2 * 8 * (32 + 88)


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
    done = lrcompress.factorize(model, rank=8, method="svd", include=["*.strange"])
    assert [linear.spec.name for linear in done.linears] == [
        "model.layers.0.mlp.strange",
        "model.layers.1.mlp.strange",
    ]
    assert done.selected.kept == 2 * 8 * (32 + 88)
    assert done.ffn.dense == 0  # not known to be FFNs


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


def test_trained_flag_and_mode_are_inherited() -> None:
    model = tiny_model().train()
    model.requires_grad_(False)
    lrcompress.factorize(model, byte_tokenizer(), rank=8, **SETTINGS)
    assert model.training
    for _, layer in compressed_layers(model):
        assert layer.training
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_target_params_and_size_are_budgets_of_the_whole_model() -> None:
    for budget in ({"target_params": 30_000}, {"target_size": "120KB"}):
        model = tiny_model()
        done = lrcompress.factorize(model, byte_tokenizer(), **budget, **SETTINGS, rank_multiple=2)
        assert done.model.kept == sum(p.numel() for p in model.parameters())
        assert done.model.kept == pytest.approx(30_000, rel=0.01)
    with pytest.raises(InputError, match=r"target of 100 parameters is out of reach"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), target_params=100, **SETTINGS)
    with pytest.raises(InputError, match="no size, write it like"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), target_size="big")


def test_search_finds_the_smallest_model_within_a_perplexity(tmp_path: Any) -> None:
    text = tmp_path / "validation.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    kept = {}
    for limit in ("0.5%", "50%"):
        model = tiny_model()
        done = lrcompress.factorize(
            model,
            byte_tokenizer(),
            max_perplexity_increase=limit,
            validation=str(text),
            **SETTINGS,
            rank_multiple=2,
        )
        held = [t for t in done.trials if t["perplexity"] <= t["limit"]]
        assert held
        assert done.selected.keep_ratio == pytest.approx(held[-1]["keep_ratio"], abs=0.02)
        kept[limit] = done.selected.keep_ratio
    assert kept["50%"] < kept["0.5%"]


def test_the_trials_of_a_search_share_decompositions(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, made, decompose = tmp_path / "validation.txt", list[int](), linalg.decompose

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return decompose(*arguments)

    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    monkeypatch.setattr(svd, "decompose", counted)
    limits: dict[str, Any] = {"max_perplexity_increase": "50%", "validation": str(text)}
    model = tiny_model()
    done = lrcompress.factorize(model, byte_tokenizer(), method="whitened", **limits, **SETTINGS)
    assert len(done.trials) > 2
    linears = len(find_ffns(tiny_model()).linears)
    assert linears < len(made) <= 2 * linears  # once for all trials, once for the result


def test_partly_selected_ffns_are_not_narrowed() -> None:
    model = tiny_model()
    done = lrcompress.factorize(
        model,
        byte_tokenizer(),
        keep_ratio=0.6,
        method="auto",
        exclude=["*.gate_proj"],
        **SETTINGS,
    )
    assert {linear.form for linear in done.linears} <= {"pivoted", None}
    assert bool(logits(model).isfinite().all())
    with pytest.raises(InputError, match="cannot be narrowed without all of its linears"):
        lrcompress.factorize(
            tiny_model(),
            byte_tokenizer(),
            keep_ratio=0.6,
            method="nystrom",
            exclude=["*.gate_proj"],
            **SETTINGS,
        )


def test_rank_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(InputError, match="rank does not go with nystrom"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), rank=8, method="nystrom")


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_merge_is_exact_and_training_moves_every_part(form: str) -> None:
    model = tiny_model()
    done = lrcompress.factorize(
        model, byte_tokenizer(), keep_ratio=0.6, method="fisher", form=form, **SETTINGS
    )
    for linear in done.linears:
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
    done = lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="svd", **SETTINGS)
    for linear in done.linears:
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
