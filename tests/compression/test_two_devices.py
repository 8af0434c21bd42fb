"""`factorize` of a model that accelerate spread over two devices, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lrcompress
from lrcompress.compression import perplexity_search
from lrcompress.compression.calibration.moments import measure_moments
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.runtime.errors import InputError
from tests.placed import FIRST, SECOND, MixedDevicesError, split, two_devices
from tests.tiny import byte_tokenizer, logits, tiny_model, tokens

SETTINGS: dict[str, Any] = {"keep_ratio": 0.6, "num_samples": 9, "seq_len": 48}
SEARCH: dict[str, Any] = {"keep_ratio": None, "max_perplexity_increase": 0.5}
PYDOC: dict[str, Any] = {"calibration": "pydoc"}


def test_tensors_of_two_devices_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_devices(monkeypatch):
        first, second = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert (first + second.to(FIRST)).tolist() == [2.0, 2.0]
        with pytest.raises(MixedDevicesError):
            _ = first + second
        with pytest.raises(MixedDevicesError):
            _ = first + torch.ones(2)
        with pytest.raises(MixedDevicesError):
            first.normal_(generator=torch.Generator(SECOND))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", PYDOC | {"sequential": "anchored"}),
        ("llama", PYDOC | {"refine": True}),
        ("llama", PYDOC | SEARCH),
        ("llama", PYDOC | {"method": "nystrom"}),
        ("llama", PYDOC | {"method": "ppm"}),
        ("llama", PYDOC | {"method": "whitened"}),
        ("gemma2", PYDOC),
        ("gpt2", PYDOC),
        ("mixtral", PYDOC),
    ],
    ids=str,
)
def test_two_devices_give_the_model_of_one(
    monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(perplexity_search, "TRIALS", 2)
    flags = SETTINGS | settings
    expected = tiny_model(family)
    lrcompress.factorize(expected, byte_tokenizer(), **flags)
    with two_devices(monkeypatch):
        model = split(tiny_model(family))
        lrcompress.factorize(model, byte_tokenizer(), **flags)
        output = model(input_ids=tokens().to(FIRST)).logits.detach().cpu()
        devices = {block_of(name): layer.weight.device for name, layer in compressed_layers(model)}
    assert (output - logits(expected)).abs().max() < 1e-4
    assert devices == {0: FIRST, 1: SECOND}


def block_of(name: str) -> int:
    """The number of the block of a linear."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def test_moments_are_on_the_device_of_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_devices(monkeypatch):
        model = split(tiny_model())
        linears = find_ffns(model).linears
        moments = measure_moments(model, linears, tokens(), gradient_samples=1)
        for linear in linears:
            device = (FIRST, SECOND)[linear.block]
            assert moments.second_moment(linear).device == device
            gradient = moments.gradient_moment(linear)
            assert gradient is not None
            assert gradient.device == device


def test_an_ffn_on_two_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_devices(monkeypatch):
        model = tiny_model().to(FIRST)
        model.model.layers[1].mlp.down_proj.to(SECOND)
        with pytest.raises(InputError, match=r"layers\.1\.mlp is spread over lazy:0 and lazy:1"):
            lrcompress.factorize(model, byte_tokenizer(), **SETTINGS)
