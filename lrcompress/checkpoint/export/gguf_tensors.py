"""The tensors of a model under llama.cpp's names and in its types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quants,
)
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lrcompress.checkpoint.export.gguf_families import GgufFamily, to_llama_cpp
from lrcompress.runtime.errors import InputError

Type = GGMLQuantizationType
# quantized types that are too coarse for the embedding and the output layer, as llama.cpp has it
COARSE = (Type.Q4_0, Type.Q5_1)
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"  # is added to float32, so llama.cpp keeps it in float32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: `source` is the model's weight or bias, in float or bfloat16."""

    name: str
    source: Tensor
    type: GGMLQuantizationType
    family: GgufFamily
    config: Any

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of `data()` in bytes."""
        return quant_shape_to_byte_shape(tuple(self.source.shape), self.type)

    def data(self) -> np.ndarray[Any, Any]:
        """The bytes (..., bytes of a row) to store.

        Raises InputError where float16 does not hold a weight.
        """
        tensor = to_llama_cpp(self.family, self.config, self.name, self.source.detach().cpu())
        weights = np.ascontiguousarray(tensor.float().numpy())
        if self.type == Type.F16 and np.abs(weights).max() > np.finfo(np.float16).max:
            raise InputError(f"{self.name} has weights beyond float16: export with --type bf16")
        return quants.quantize(weights, self.type).view(np.uint8)


def gguf_tensors(
    model: Any, family: GgufFamily, wanted: GGMLQuantizationType
) -> Iterator[GgufTensor]:
    """All parameters of `model`; tied ones once.

    Raises InputError where llama.cpp's architecture has no place for one.
    """
    architecture = next(a for a, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for module_name, parameter in _parameters(model):
        name = _gguf_name(names, module_name)
        if name is None:
            raise InputError(
                f"{module_name} has no place in llama.cpp's architecture {family.architecture!r}: "
                "this model cannot be exported to GGUF"
            )
        kind = _stored_type(name, tuple(parameter.shape), wanted)
        yield GgufTensor(name, parameter, kind, family, model.config)


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, those of linears as (out, in)."""
    for name, parameter in model.named_parameters():
        is_transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        yield name, parameter.T if is_transposed and parameter.ndim == 2 else parameter


def _gguf_name(names: Any, module_name: str) -> str | None:
    """The name in the file; the table has some families' names without their base model's."""
    for candidate in (module_name, module_name.removeprefix("transformer.")):
        name = names.get_name(candidate, try_suffixes=(".weight", ".bias"))
        if name is not None:
            return str(name)
    return None


def _stored_type(
    name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType
) -> GGMLQuantizationType:
    """The type of one tensor; float16 where rows are no multiple of the type's group."""
    if len(shape) == 1 or name == POSITIONS:
        return Type.F32
    if name in EMBEDDINGS and wanted in COARSE:
        wanted = Type.Q8_0
    return Type.F16 if shape[-1] % group_size(wanted) else wanted


def group_size(kind: GGMLQuantizationType) -> int:
    """The number of weights of a row that are quantized together; 1 for floating-point types."""
    return int(GGML_QUANT_SIZES[kind][0])
