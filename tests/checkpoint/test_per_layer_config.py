"""What docs/checkpoint.md says of transformers' `per_layer_config`.

When one of these tests fails, transformers has learned to build FFNs by it: then checkpoints can
state their widths there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import lrcompress
from tests.tiny import FAMILIES, byte_tokenizer, copied_model, tiny_model

pytestmark = pytest.mark.skipif(
    not hasattr(PreTrainedConfig, "per_layer_config"), reason="transformers before 5.15"
)
ALLOWED = {"allow_global_per_layer_attribute_access": True}


@pytest.fixture
def narrowed(tmp_path: Path) -> tuple[Path, dict[str, dict[str, int]]]:
    """A narrowed checkpoint, and the widths of its blocks as `per_layer_config`."""
    model = tiny_model()
    settings: dict[str, Any] = {"num_samples": 4, "seq_len": 48, "calibration": ["pydoc"]}
    lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="nystrom", **settings)
    lrcompress.save(model, tmp_path / "narrowed")
    layers = enumerate(model.model.layers)
    widths = {str(i): {"intermediate_size": x.mlp.down_proj.in_features} for i, x in layers}
    return tmp_path / "narrowed", widths


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_ffns_read_the_width_of_the_whole_model(family: str) -> None:
    widths = {0: {"intermediate_size": 40}, 1: {"intermediate_size": 64}}
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        tiny_model(family, per_layer_config=widths)
    config = AutoConfig.for_model(family, **FAMILIES[family], per_layer_config=widths, **ALLOWED)
    model = AutoModelForCausalLM.from_config(config)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [88, 88]


def test_checkpoints_that_state_it_do_not_load_or_load_as_before(
    narrowed: tuple[Path, dict[str, dict[str, int]]], tmp_path: Path
) -> None:
    folder, widths = narrowed
    stated = copied_model(folder, tmp_path / "stated", per_layer_config=widths)
    with pytest.raises(Exception, match="per-layer attribute"):
        lrcompress.load(stated)
    allowed = copied_model(folder, tmp_path / "allowed", per_layer_config=widths, **ALLOWED)
    model = AutoModelForCausalLM.from_pretrained(allowed)
    layers = enumerate(model.model.layers)
    assert widths == {str(i): {"intermediate_size": x.mlp.down_proj.in_features} for i, x in layers}
