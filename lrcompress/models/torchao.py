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

INT4_GROUP_SIZE = 32  # consecutive weights of a row that share one scale


def quantize(model: Any, weights: str) -> list[str]:
    """Quantizes the weights of all linears of `model` except the output layer, in place.

    In a low-rank layer these are its two matrices. `weights` is "int8" (symmetric, one scale for
    each row) or "int4" (one scale for 32 weights of a row). Returns the names of the quantized
    linears. The quantized model can be saved and loaded. Raises InputError where torchao is
    missing, the model is already quantized or has no linear to quantize, and MachineError where
    this machine does not support int4.
    """
    torchao_config = _torchao_config(weights)
    refuse_quantized(model, "start from the model before quantization")
    names, skipped = _split_linears(model, weights)
    if not names:
        kind = model.config.model_type
        raise InputError(f"nothing to quantize: {kind!r} has no torch linear")
    from torchao.quantization import quantize_

    selected = set(names)
    try:
        quantize_(model, torchao_config, filter_fn=lambda _, name: name in selected)
    except (RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
        if machine_fault_reason(error):
            raise  # such as too little memory, which is not about int4
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"{weights} weights are not available on this machine: {reason}"
        ) from None
    _attach_quantizer(model, torchao_config, skipped)
    return names


def _torchao_config(weights: str) -> Any:
    require_extra("torchao", "quantize")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if weights == "int8":
        return Int8WeightOnlyConfig()
    return Int4WeightOnlyConfig(group_size=INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d")


def _split_linears(model: Any, weights: str) -> tuple[list[str], list[str]]:
    """Names of the linears to quantize, and of those to skip."""
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    group_size = 1 if weights == "int8" else INT4_GROUP_SIZE
    selected = [n for n, m in linears.items() if m is not head and m.in_features % group_size == 0]
    return selected, [name for name in linears if name not in selected]


def _attach_quantizer(model: Any, torchao_config: Any, skipped: list[str]) -> None:
    """Makes transformers save and treat `model` like one that was loaded quantized."""
    modules = layout(model)
    if modules:
        config: Any = QuantizedLowRankConfig(
            torchao_config, modules, modules_to_not_convert=skipped
        )
        quantizer: Any = QuantizedLowRankQuantizer(config, pre_quantized=True)
    else:
        config = TorchAoConfig(torchao_config, modules_to_not_convert=skipped)
        quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = config.quant_method
