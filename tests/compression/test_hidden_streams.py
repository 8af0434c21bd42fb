"""Hidden states of single blocks are those of the whole model; additions are recognized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrcompress.compression.hidden_streams import HiddenStreams
from tests.tiny import tiny_model, tokens

FAMILIES = ["llama", "phi3", "gpt2", "openai-gpt", "opt", "gemma2", "falcon", "gpt_neox", "mpt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_reproduce_the_model(family: str) -> None:
    model = tiny_model(family)
    sample = tokens(2, 16)
    with torch.no_grad():
        streams = HiddenStreams(model, sample)
        hidden = streams.dense[1]
        for index in range(len(streams.blocks)):
            hidden = streams.run(index, hidden).output
        outputs: list[Any] = []
        streams.blocks[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        model(input_ids=sample[1:])
    expected = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "adds"), [("llama", True), ("gemma2", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adds_to_the_residual_stream_is_seen_in_any_precision(
    family: str, adds: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(family).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(300)  # a stream much larger than what is added
        streams = HiddenStreams(model, tokens(2, 16))
        assert streams.adds_to_residual(0, "model.layers.0.mlp.down_proj") == adds
