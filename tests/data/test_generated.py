"""Text that the model writes follows the model's own distribution."""

from __future__ import annotations

import torch

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
