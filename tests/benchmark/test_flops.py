"""FLOPs are those that torch counts while a model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lrcompress
from lrcompress.benchmark import flops
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.training.self_guided import Guidance, guides
from tests.tiny import tiny_model, tokens

BATCH, LENGTH = 3, 24


def counted(model: Any) -> int:
    """By torch, of a forward and a backward pass, without the rotary angles."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = tokens(BATCH, LENGTH)
    with FlopCounterMode(display=False) as mode:
        model(input_ids=batch, labels=batch).loss.backward()
    rotary = [n for n in mode.get_flop_counts() if n.endswith("rotary_emb")]
    angles = sum(sum(mode.get_flop_counts()[name].values()) for name in rotary[:1])
    return int(mode.get_total_flops() - angles)


def lowrank(form: str) -> Any:
    model = tiny_model(attn_implementation="eager")
    lrcompress.factorize(model, keep_ratio=0.5, method="svd", form=form, rank_multiple=4)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_dense(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    assert flops.count(model, LENGTH).training * BATCH * LENGTH == counted(model)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_low_rank(form: str) -> None:
    model = lowrank(form)
    found = flops.count(model, LENGTH)
    assert found.training * BATCH * LENGTH == counted(model)
    dense = flops.count(tiny_model(), LENGTH)
    assert found.ffn / dense.ffn == pytest.approx(0.5, abs=0.05)
    assert (found.projections, found.head) == (dense.projections, dense.head)


def test_guides() -> None:
    model, dense = lowrank("factored"), tiny_model()
    pairs = guides(model, dict(dense.named_modules()))
    cost = sum(flops.linear_flops(guide) for _, guide in pairs)
    guidance = Guidance(steps=10, reduced=False, seed=0)
    guidance.share = 0.5
    with guidance.guiding(pairs, training=True):
        found = counted(model)
    assert found == flops.run_flops(model, LENGTH, BATCH * LENGTH, 1, cost, 1)
    assert len(list(compressed_layers(model))) == len(pairs) == 6


def test_a_model_without_weights_has_the_same() -> None:
    with torch.device("meta"):
        bare = type(tiny_model())(tiny_model().config)
    assert flops.count(bare, LENGTH) == flops.count(tiny_model(), LENGTH)
