"""Products in bfloat16: only of wide float32 models, and never in what hooks sum."""

from __future__ import annotations

import pytest
import torch

from lrcompress.layers import model_state
from lrcompress.layers.model_state import bfloat16_products, exact_products
from tests.tiny import tiny_model

INPUT = torch.ones(1, 4)
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


def product_dtype() -> torch.dtype:
    return (INPUT @ INPUT.T).dtype


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no instructions for bfloat16")
def test_wide_float32_models_multiply_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(model_state, "BFLOAT16_MINIMUM_WIDTH", model.config.hidden_size)
    with bfloat16_products(model):
        assert product_dtype() == torch.bfloat16
        with exact_products():
            assert product_dtype() == torch.float32
    assert product_dtype() == torch.float32


def test_other_models_do_not() -> None:
    with bfloat16_products(tiny_model()):  # too narrow
        assert product_dtype() == torch.float32
    with bfloat16_products(tiny_model().double()):
        assert product_dtype() == torch.float32
