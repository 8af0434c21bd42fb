"""Budgets of the whole model, FFNs that are selected in part, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer, logits, tiny_model

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 48}


def test_target_params_and_size_are_budgets_of_the_whole_model() -> None:
    for budget in ({"target_params": 30_000}, {"target_size": "120KB"}):
        model = tiny_model()
        result = lrcompress.factorize(
            model, byte_tokenizer(), **budget, **SETTINGS, rank_multiple=2
        )
        assert result.model.kept == sum(p.numel() for p in model.parameters())
        assert result.model.kept == pytest.approx(30_000, rel=0.01)
    with pytest.raises(InputError, match=r"target of 100 parameters is out of reach"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), target_params=100, **SETTINGS)
    with pytest.raises(InputError, match="is not a size, write it like"):
        lrcompress.factorize(tiny_model(), byte_tokenizer(), target_size="big")


def test_partly_selected_ffns_are_not_narrowed() -> None:
    model = tiny_model()
    result = lrcompress.factorize(
        model,
        byte_tokenizer(),
        keep_ratio=0.6,
        method="auto",
        exclude=["*.gate_proj"],
        **SETTINGS,
    )
    assert {linear.form for linear in result.linears} <= {"pivoted", None}
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


def test_non_finite_weight_names_the_linear() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("inf")
    with pytest.raises(InputError, match=r"weight of model\.layers\.1\.mlp\.up_proj is not finite"):
        lrcompress.factorize(model, keep_ratio=0.5, method="svd")
