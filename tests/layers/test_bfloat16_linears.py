"""Products in bfloat16: of linears of wide float32 models alone, with frozen weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lrcompress.layers import bfloat16_linears as module
from lrcompress.layers.bfloat16_linears import bfloat16_linears, copied_bytes
from tests.tiny import tiny_model


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = tiny_model()
    monkeypatch.setattr(module, "MINIMUM_WIDTH", model.config.hidden_size)
    # every CPU computes it, those without instructions for it more slowly
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return model


def down_of(model: Any) -> nn.Linear:
    down: nn.Linear = model.get_submodule("model.layers.0.mlp.down_proj")
    return down


def test_products_are_of_rounded_numbers(model: Any) -> None:
    down = down_of(model)
    down.bias = nn.Parameter(torch.full((down.out_features,), 1 / 3))
    inputs = torch.rand(3, down.in_features)
    rounded = inputs.bfloat16().double() @ down.weight.bfloat16().double().T
    expected = rounded.float().bfloat16().float() + down.bias
    with bfloat16_linears(model):
        output = down(inputs)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=1e-6)
    product = output - down.bias.detach()
    torch.testing.assert_close(product, product.bfloat16().float(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(output, down(inputs))


def test_gradients_reach_inputs_and_not_weights(model: Any) -> None:
    down = down_of(model)
    inputs = torch.rand(3, down.in_features, requires_grad=True)
    with bfloat16_linears(model):
        down(inputs).sum().backward()
    assert down.weight.grad is None
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32
    torch.testing.assert_close(inputs.grad[0], down.weight.sum(0), rtol=0.02, atol=0.01)


def test_the_model_is_as_before_afterwards(model: Any) -> None:
    tokens = torch.arange(8)[None]
    before = model(input_ids=tokens).logits
    with bfloat16_linears(model):
        assert not torch.equal(model(input_ids=tokens).logits, before)
    with pytest.raises(ZeroDivisionError), bfloat16_linears(model):
        raise ZeroDivisionError
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_linears_that_others_replaced_keep_their_forward(model: Any) -> None:
    down = down_of(model)
    down.forward = torch.clone  # type: ignore[method-assign]
    with bfloat16_linears(model):
        assert down(torch.ones(1)) == 1
    assert "forward" in vars(down)


def test_models_stay_exact_on_cpus_without_instructions(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with bfloat16_linears(model):
        assert all("forward" not in vars(layer) for layer in model.modules())


def test_narrow_models_and_other_types_stay_exact(model: Any) -> None:
    narrow, double = tiny_model(), model.double()
    narrow.config.hidden_size = module.MINIMUM_WIDTH - 1
    for exact in (narrow, double):
        with bfloat16_linears(exact):
            assert all("forward" not in vars(layer) for layer in exact.modules())


def test_bytes_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(hidden_size=module.MINIMUM_WIDTH, intermediate_size=8)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert copied_bytes(model) == 2 * linears
    assert copied_bytes(model.bfloat16()) == 0
