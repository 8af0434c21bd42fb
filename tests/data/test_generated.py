"""Text that the model writes follows the model's own distribution."""

from __future__ import annotations

import pytest
import torch

from lrcompress.data import generated
from lrcompress.data.generated import sampled_blocks
from lrcompress.runtime.progress import silent
from tests.tiny import tiny_model

DOCUMENTS, LENGTH = 2048, 8


def test_tokens_are_drawn_from_the_models_softmax() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # of a flat distribution any draw would look right
        documents = sampled_blocks(model, None, DOCUMENTS, LENGTH, 0, silent)
        probabilities = model(input_ids=documents[:, :-1]).logits.double().softmax(-1)
    probabilities = probabilities.flatten(0, 1)
    drawn = torch.nn.functional.one_hot(documents[:, 1:].flatten(), probabilities.shape[-1])
    expected = probabilities.sum(0)
    deviation = (probabilities * (1 - probabilities)).sum(0).sqrt()
    assert float(expected.max() / expected.median()) > 3
    assert float(((drawn.sum(0) - expected) / deviation).abs().max()) < 4.5
    entropy = -(probabilities * probabilities.clamp(min=1e-300).log()).sum(-1).mean()
    surprise = -(drawn * probabilities.clamp(min=1e-300).log()).sum(-1).mean()
    assert abs(float(surprise - entropy)) < 0.05


@pytest.mark.parametrize("columns", [257, 96, 1])  # a prime, and two with groups
def test_a_share_of_the_sum_falls_into_its_column(columns: int) -> None:
    weights = torch.rand(3, columns, generator=torch.Generator().manual_seed(0))
    weights[:, ::3] = 0 if columns > 1 else 1
    edges = torch.cat([torch.zeros(3, 1), weights.cumsum(-1)], dim=-1)
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    for column in weights[0].nonzero().flatten().tolist():
        share = middles[:, column : column + 1] / edges[:, -1:]
        assert generated._drawn(weights, share).flatten().tolist() == [column] * 3
    last = int(weights[0].nonzero().max())
    assert generated._drawn(weights, torch.full((3, 1), 1 - 1e-7)).flatten().tolist() == [last] * 3
