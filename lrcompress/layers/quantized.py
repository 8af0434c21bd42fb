"""What can be told of a model whose weights are quantized."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor, nn

from lrcompress.runtime.protocols import InputError


def is_quantized(model: Any) -> bool:
    """Whether transformers' loader, or `lrcompress quantize`, left quantized weights in it."""
    return getattr(model, "hf_quantizer", None) is not None


def require_torchao() -> None:
    """Raises InputError where the package that quantizes is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("quantized weights need torchao: pip install 'lrcompress[quantize]'")


def refuse_quantized(model: Any, remedy: str) -> None:
    """Raises InputError with `remedy` where the weights of `model` are quantized."""
    if is_quantized(model):
        method = model.hf_quantizer.quantization_config.quant_method
        raise InputError(
            f"the model's weights are quantized ({getattr(method, 'value', method)}): {remedy}"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once; of a quantized one, what it consists of."""
    return sum(map(_bytes, model.parameters()))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
