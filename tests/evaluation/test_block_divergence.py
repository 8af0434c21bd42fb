"""Later models against the first one, block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lrcompress
from lrcompress.data.corpora import read_corpus
from lrcompress.data.windows import Windowing
from lrcompress.evaluation.block_divergence import block_changes
from tests.conftest import invoke
from tests.evaluation.conftest import LENGTH
from tests.tiny import FAMILIES, byte_tokenizer, tiny_model


def broken(folder: Path, out: Path, block: int) -> Path:
    """The model with every weight of one block set to zero."""
    model, tokenizer = lrcompress.load(folder)
    for parameter in model.model.layers[block].parameters():
        parameter.data.zero_()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("block", [0, 1])
def test_a_zeroed_block_is_named_and_the_model_is_worse(
    trained: Path, text: Path, tmp_path: Path, block: int
) -> None:
    out = tmp_path / "report"
    result = invoke(
        "eval", broken(trained, tmp_path / "broken", block), "--baseline", trained, "--no-speed",
        "--perplexity", text, "--context-length", str(LENGTH), "--limit", "8", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"changed most in block {block}, by 1 of what it computes" in result.output
    content = json.loads((out / "metrics.json").read_text())
    assert [comparison["verdict"] for comparison in content["comparisons"]] == ["worse"]
    errors = content["details"]["blocks"][0]["errors"]
    assert errors[block] == pytest.approx(1)
    assert errors[1 - block] == 0
    for page in ("report.md", "report.html"):
        assert f"changed most in block {block}" in (out / page).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_can_be_compared(family: str, text: Path) -> None:
    model, other = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        last = list(other.parameters())[-3:]
        for parameter in last:
            parameter.mul_(1.5)
    models = {"0": (model, byte_tokenizer()), "1": (other, byte_tokenizer())}
    for each, _ in models.values():
        each.eval()
    (change,) = block_changes(models, read_corpus(str(text), "test"), Windowing(32, limit=1))
    assert len(change.errors) == model.config.get_text_config().num_hidden_layers
    assert all(error >= 0 for error in change.errors)
