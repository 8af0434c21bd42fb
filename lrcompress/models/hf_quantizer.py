"""Teaches `from_pretrained` to rebuild low-rank layers.

transformers calls a registered quantizer between building a model's skeleton and reading its
weights, which is the moment at which the dense layers have to give way. Of a checkpoint as
`factorize` writes it nothing is quantized: once the weights are in, the quantizer detaches itself,
and what is left is an ordinary model that can be cast, trained and saved. The weights of low-rank
layers can be quantized as well, by torchao; then transformers' own quantizer for it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from lrcompress.layers.lowrank import PivotedLinear, compressed_layers, layout, rebuild
from lrcompress.layers.model_info import is_quantized
from lrcompress.models.safetensors_headers import check_types, stored_tensors
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra

QUANT_METHOD = "lowrank"
QUANTIZED_METHOD = "lowrank_torchao"
LOW_RANK = (QUANT_METHOD, QUANTIZED_METHOD)
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
READ = "_is_hf_initialized"


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a low-rank checkpoint: module name -> {form, shape, rank}."""

    def __init__(
        self,
        /,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        records = modules.values() if isinstance(modules, Mapping) else [None]
        if unknown or not all(isinstance(record, Mapping) for record in records):
            have = f"no {', '.join(unknown)}" if unknown else "nothing else"
            raise InputError(
                "quantization_config of the checkpoint is damaged: it has to have modules, each "
                f"with form, shape and rank, and {have}: get an intact copy"
            )
        assert modules is not None
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has low-rank format version {format_version}, this lrcompress "
                f"reads version {FORMAT_VERSION}: install the version that wrote it"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {name: dict(record) for name, record in modules.items()}


@register_quantizer(QUANT_METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps low-rank layers into the skeleton, then takes itself off the loaded model."""

    def __init__(self, quantization_config: LowRankConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "a model cannot be factorized while it loads: load it dense, then call "
                "lrcompress.factorize(model, ...)"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        rebuild(model, self.quantization_config.modules)
        files = [Path(file) for file in checkpoint_files or ()]
        check_types(stored_tensors(file for file in files if file.suffix == SUFFIX))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_loaded(model)
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@register_quantization_config(QUANTIZED_METHOD)
class QuantizedLowRankConfig(TorchAoConfig):  # type: ignore[misc]
    """`quantization_config` of a checkpoint with low-rank layers and quantized weights: what
    torchao's has, and what `LowRankConfig` has."""

    def __init__(
        self,
        quant_type: Any,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        modules_to_not_convert: list[str] | None = None,
        **defaults: object,
    ) -> None:
        super().__init__(quant_type, modules_to_not_convert)
        self.__dict__ |= vars(LowRankConfig(modules, format_version)) | {
            "quant_method": QUANTIZED_METHOD
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> QuantizedLowRankConfig:
        require_extra("torchao", "quantize")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[no-any-return]


@register_quantizer(QUANTIZED_METHOD)
class QuantizedLowRankQuantizer(TorchAoHfQuantizer):  # type: ignore[misc]
    """Swaps low-rank layers into the skeleton, and lets torchao's loader fill them."""

    quantization_config: QuantizedLowRankConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        rebuild(model, self.quantization_config.modules)
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_orders(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


def check_loaded(model: nn.Module) -> None:
    """Raises InputError that names the module whose weights are not those of a checkpoint: missing,
    misshapen, no floating point, or an order that is none. What is offloaded is not looked at.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(f"{name} is stored as {parameter.dtype}: get an intact copy")
    # transformers marks the tensors that it read; other ones are random
    if any(hasattr(parameter, READ) for parameter in model.parameters()):
        for name, tensor in _expected(model):
            if not tensor.is_meta and not getattr(tensor, READ, False):
                raise InputError(
                    f"{name} is not in the checkpoint, or not in the shape that its config.json "
                    "records: get an intact copy"
                )
    check_orders(model)


def _expected(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoint has to hold: compressed layers, and the weights of the model that was
    saved. A model of another class has a head of its own, which may be new."""
    for name, layer in compressed_layers(model):
        for part, tensor in layer.state_dict(keep_vars=True).items():
            yield f"{name}.{part}", tensor
    whole = type(model).__name__ in (model.config.architectures or ())
    yield from (model if whole else model.base_model).named_parameters()


def check_orders(model: nn.Module) -> None:
    """Raises InputError that names the pivoted layer whose order is none."""
    for name, layer in compressed_layers(model):
        if isinstance(layer, PivotedLinear) and not layer.order.is_meta:
            order = layer.order.long().sort().values.cpu()
            if not torch.equal(order, torch.arange(len(order))):
                raise InputError(
                    f"the order of {name} does not name each of its {len(order)} inputs once: get "
                    "an intact copy"
                )


def record_layout(model: Any) -> None:
    """Writes the low-rank layers of `model` into its config, so that saving keeps them."""
    if is_quantized(model):
        return  # whoever quantized it has recorded both
    modules = layout(model)
    if modules:
        model.config.quantization_config = LowRankConfig(modules)
    else:
        model.config.__dict__.pop("quantization_config", None)
