"""Dense exports of narrowed models have the narrower width, wherever the config keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Gemma3nTextConfig

import lrcompress
from lrcompress.checkpoint.export.dense import _configs_of_width
from tests.conftest import SMALL, invoke
from tests.tiny import INNER, saved_class


def test_the_width_of_a_language_model_beside_others(tmp_path: Path) -> None:
    source = saved_class(tmp_path / "source", "Gemma3ForConditionalGeneration")
    options = ("--keep-ratio", "0.6", "--method", "nystrom", *SMALL)
    result = invoke("factorize", source, "--out", tmp_path / "small", *options)
    assert result.exit_code == 0, result.output
    result = invoke("export", tmp_path / "small", "--to", "dense", "--out", tmp_path / "dense")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] < INNER
    assert "intermediate_size" not in config
    tokens = torch.arange(1, 9)[None]
    (small, _), (dense, _) = (lrcompress.load(tmp_path / name) for name in ("small", "dense"))
    with torch.no_grad():
        difference = small(input_ids=tokens).logits - dense(input_ids=tokens).logits
    assert difference.abs().max() < 1e-4


def test_a_width_for_each_block() -> None:
    config = Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[64, 96])
    (changed,) = _configs_of_width(config, 80)
    assert changed.intermediate_size == [80, 80]
    assert not list(_configs_of_width(config, 97))
