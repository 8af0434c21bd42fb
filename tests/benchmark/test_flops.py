"""Analytic FLOPs are those that torch counts while a model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lrcompress
from lrcompress.benchmark import flops
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.training.self_guided import Guidance, guide_pairs
from tests.tiny import tiny_model, tokens

BATCH, LENGTH = 3, 24


def flops_by_torch(model: Any) -> int:
    """Of a forward and a backward pass, without the rotary angles."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = tokens(BATCH, LENGTH)
    with FlopCounterMode(display=False) as mode:
        model(input_ids=batch, labels=batch).loss.backward()
    by_module = mode.get_flop_counts()
    rotary = [name for name in by_module if name.endswith("rotary_emb")]
    rotary_flops = sum(sum(by_module[name].values()) for name in rotary[:1])
    return int(mode.get_total_flops() - rotary_flops)


def low_rank_model(form: str) -> Any:
    model = tiny_model(attn_implementation="eager")
    lrcompress.factorize(model, keep_ratio=0.5, method="svd", form=form, rank_multiple=4)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_dense_model(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    assert flops.analytic_flops(model, LENGTH).training * BATCH * LENGTH == flops_by_torch(model)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_low_rank_model(form: str) -> None:
    model = low_rank_model(form)
    low_rank = flops.analytic_flops(model, LENGTH)
    assert low_rank.training * BATCH * LENGTH == flops_by_torch(model)
    dense = flops.analytic_flops(tiny_model(), LENGTH)
    assert low_rank.ffn / dense.ffn == pytest.approx(0.5, abs=0.05)
    assert (low_rank.projections, low_rank.head) == (dense.projections, dense.head)


def test_guides_count_too() -> None:
    model, dense = low_rank_model("factored"), tiny_model()
    pairs = guide_pairs(model, dict(dense.named_modules()))
    guide_flops = sum(flops.linear_flops(guide) for _, guide in pairs)
    guidance = Guidance(steps=10, reduced=False, seed=0)
    guidance.share = 0.5
    with guidance.guiding(pairs, train_guides=True):
        expected = flops_by_torch(model)
    assert flops.run_flops(model, LENGTH, BATCH * LENGTH, 1, guide_flops, 1) == expected
    assert len(list(compressed_layers(model))) == len(pairs) == 6


def test_a_model_without_weights_has_the_same_flops() -> None:
    with torch.device("meta"):
        bare = type(tiny_model())(tiny_model().config)
    assert flops.analytic_flops(bare, LENGTH) == flops.analytic_flops(tiny_model(), LENGTH)
