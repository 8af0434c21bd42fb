"""Models to compare with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import lrcompress

LENGTH = 64


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama after it has learned the sentence of the fixture `text`."""
    model, tokenizer = lrcompress.load(dense)
    words = tokenizer("The quick brown fox jumps over the lazy dog. " * 3)["input_ids"]
    tokens = torch.tensor([words[:100]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    out = tmp_path_factory.mktemp("trained") / "model"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def loaded(*folders: Path) -> dict[str, Any]:
    models = {str(index): lrcompress.load(folder) for index, folder in enumerate(folders)}
    for model, _ in models.values():
        model.eval()
    return models
