"""Dense exports of narrowed models have the narrower width, wherever the config keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lrcompress
from lrcompress.checkpoint.export.dense import _width_of_each_block, to_stock
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.model_info import parameter_count
from lrcompress.methods.types import LinearSpec
from tests.conftest import SMALL, invoke
from tests.tiny import INNER, byte_tokenizer, logits, saved_class, tiny_model


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


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gemma3n_text", "intermediate_size"),  # a list
        ("recurrent_gemma", "intermediate_size"),  # twice the width
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("nemotron_h", "moe_shared_expert_intermediate_size"),
        ("zamba", "intermediate_size"),
    ],
)
def test_a_narrowed_family_gets_smaller(family: str, key: str) -> None:
    model = tiny_model(family)
    original = getattr(model.config, key)
    lrcompress.factorize(
        model,
        byte_tokenizer(),
        keep_ratio=0.5,
        method="nystrom",
        ranks="uniform",
        num_samples=4,
        seq_len=48,
    )
    expected, narrow = logits(model), parameter_count(model)
    widths = {s.block: s.in_features for s in find_ffns(model).linears if s.role == "down"}
    to_stock(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    changed = getattr(model.config, key)
    assert changed < original
    if isinstance(original, list):
        assert changed == list(widths.values())
        assert parameter_count(model) == narrow


def test_a_list_keeps_what_is_wider() -> None:
    specs = [
        LinearSpec(
            name=str(n), block=block, role="down", in_features=width, out_features=8, bias=False,
            input_group="", ffn="",
        )
        for n, (block, width) in enumerate([(0, 64), (0, 70), (2, 80)])
    ]  # fmt: skip
    assert _width_of_each_block([96, 97, 98], specs) == [70, 97, 80]
