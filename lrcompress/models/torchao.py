"""Weight-only quantization of all linears, dense or low-rank, by torchao."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import TorchAoConfig

from lrcompress.layers.lowrank import layout
from lrcompress.layers.model_info import refuse_quantized
from lrcompress.models.hf_quantizer import QuantizedLowRankConfig, QuantizedLowRankQuantizer
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.packages import require_extra

GROUP = 32  # entries of a row that share a scale of int4


def quantize(model: Any, weights: str) -> list[str]:
    """Quantizes the weights of every linear of `model` but the output layer, in place.

    Of a low-rank layer that is each of its two matrices. `weights` is int8 (one scale for each
    row, symmetric) or int4 (one for each 32 entries of a row). Returns the names of the linears.
    The model can then be saved, and loaded as it is. Raises InputError where torchao is missing,
    where the model is quantized already or has no such linear, and MachineError where this machine
    has no int4.
    """
    scheme = _scheme(weights)
    refuse_quantized(model, "start from the model before quantization")
    names, left = _divided(model, weights)
    if not names:
        kind = model.config.model_type
        raise InputError(f"nothing to quantize: {kind!r} keeps its weights in no torch linear")
    from torchao.quantization import quantize_

    chosen = set(names)
    try:
        quantize_(model, scheme, filter_fn=lambda _, name: name in chosen)
    except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
        if machine_fault_reason(error):
            raise  # no memory, say: that is another sentence
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"{weights} weights are not to be had on this machine: {reason}"
        ) from None
    _attach(model, scheme, left)
    return names


def _scheme(weights: str) -> Any:
    """torchao's own configuration of `weights`."""
    require_extra("torchao", "quantize")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if weights == "int8":
        return Int8WeightOnlyConfig()
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")


def _divided(model: Any, weights: str) -> tuple[list[str], list[str]]:
    """Names of the linears to quantize, and of those that are left."""
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    whole = 1 if weights == "int8" else GROUP
    taken = [n for n, m in linears.items() if m is not head and m.in_features % whole == 0]
    return taken, [name for name in linears if name not in taken]


def _attach(model: Any, scheme: Any, left: list[str]) -> None:
    """Has transformers save and treat `model` as one that was loaded quantized."""
    modules = layout(model)
    if modules:
        config: Any = QuantizedLowRankConfig(scheme, modules, modules_to_not_convert=left)
        quantizer: Any = QuantizedLowRankQuantizer(config, pre_quantized=True)
    else:
        config = TorchAoConfig(scheme, modules_to_not_convert=left)
        quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method
