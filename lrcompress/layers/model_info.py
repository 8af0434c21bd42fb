"""What a model's own numbers say: its parameter count and the lengths and modes it runs in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrcompress.layers.lowrank import is_compressed
from lrcompress.runtime.errors import InputError

DEFAULT_LENGTH = 1024
POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding_count(model: Any) -> int:
    """Parameters of the token embedding and the output layer, tied ones once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(end.weight): end.weight for end in ends if end is not None}
    return sum(int(weight.numel()) for weight in weights.values())


def maximum_length(model: Any) -> int | None:
    """Positions that the model has, under any of the names that families give it."""
    config = model.config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in POSITIONS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def sequence_length(model: Any, wanted: int | None) -> int:
    """`wanted` tokens, or 1024 or the model's maximum. InputError where wanted exceeds that."""
    limit = maximum_length(model)
    if wanted is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and wanted > limit:
        raise InputError(f"a length of {wanted} tokens exceeds the model's maximum of {limit}")
    return wanted


def model_kind(model: Any, trained: bool = False) -> str:
    """What a model is called in a report."""
    name = ("finetuned" if trained else "factorized") if is_compressed(model) else "dense"
    return f"quantized {name}" if is_quantized(model) else name


def is_quantized(model: Any) -> bool:
    """Whether transformers' loader, or `lrcompress quantize`, left quantized weights in it."""
    return getattr(model, "hf_quantizer", None) is not None


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
