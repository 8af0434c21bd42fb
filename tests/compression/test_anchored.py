"""Anchored fits: exact where nothing is lost, no worse in what they minimise, safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.compression.anchored import AnchoredWalk, RidgeFit
from lrcompress.compression.hidden_streams import HiddenStreams
from lrcompress.layers.lowrank import compressed_layers
from tests.tiny import byte_tokenizer, logits, tiny_model, tokens

SETTINGS: dict[str, Any] = {"num_samples": 16, "seq_len": 64, "sequential": "anchored"}
FAMILIES = ["llama", "phi3", "gpt2", "openai-gpt", "opt", "gemma2", "falcon", "gpt_neox", "mpt"]


def test_fit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    fit = RidgeFit("the input")
    fit.add(x[:100], x[:100] @ weight.T)
    fit.add(x[100:], x[100:] @ weight.T)
    torch.testing.assert_close(fit.weight(torch.zeros(4, 6), 1e-9).float(), weight)
    assert float((fit.weight(weight * 2, 1e6).float() - weight * 2).abs().max()) < 1e-3
    torch.testing.assert_close(fit.second_moment().float(), x.T @ x / 200)


def test_the_pull_towards_the_weights_is_by_each_inputs_own_size() -> None:
    """A unit of an input changes its weights by that unit; silent inputs keep theirs."""
    generator = torch.Generator().manual_seed(0)
    x, targets = (torch.randn(50, width, generator=generator) for width in (6, 4))
    x[:, 5] = 0
    units = torch.tensor([0.1, 1.0, 10.0, 5.0, 0.5, 1.0])
    prior = torch.randn(4, 6, generator=generator)
    plain, scaled = RidgeFit("x"), RidgeFit("x")
    plain.add(x, targets)
    scaled.add(x * units, targets)
    found = plain.weight(prior, 0.3)
    again = scaled.weight(prior / units, 0.3) * units
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 5].float(), prior[:, 5])
    silent = RidgeFit("x")
    silent.add(torch.zeros(50, 6), targets)
    torch.testing.assert_close(silent.weight(prior, 0.3).float(), prior)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_reproduce_the_model(family: str) -> None:
    model = tiny_model(family)
    sample = tokens(2, 16)
    with torch.no_grad():
        streams = HiddenStreams(model, sample)
        hidden = streams.dense[1]
        for index in range(len(streams.blocks)):
            hidden = streams.run(index, hidden).output
        found: list[Any] = []
        streams.blocks[-1].register_forward_hook(lambda _, __, output: found.append(output))
        model(input_ids=sample[1:])
    expected = found[0] if isinstance(found[0], torch.Tensor) else found[0][0]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["auto", "whitened"])
def test_closer_to_the_dense_model_on_the_calibration_text(family: str, method: str) -> None:
    errors = {}
    expected = logits(tiny_model(family))
    for sequential in ("independent", "anchored"):
        model = tiny_model(family)
        settings = SETTINGS | {"sequential": sequential, "rank_multiple": 2}
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method=method, **settings)
        errors[sequential] = float((logits(model) - expected).norm())
    assert errors["anchored"] < 1.1 * errors["independent"]


def test_failure_puts_the_dense_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before, calls = logits(model), []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    original = AnchoredWalk._fit_down
    monkeypatch.setattr(AnchoredWalk, "_fit_down", breaks)
    with pytest.raises(KeyboardInterrupt):
        lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.5, method="nystrom", **SETTINGS)
    assert not any(compressed_layers(model))
    assert torch.equal(logits(model), before)


def test_anchoring_text_is_on_record_even_where_the_method_reads_none() -> None:
    model = tiny_model()
    done = lrcompress.factorize(model, byte_tokenizer(), keep_ratio=0.6, method="svd", **SETTINGS)
    assert done.calibration is not None
    assert done.calibration.tokens == 16 * 64


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
