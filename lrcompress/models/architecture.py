"""The class of a model, which its config names: how it is found, built and loaded again."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrcompress.layers.model_info import predicts_next_token
from lrcompress.runtime.errors import InputError

# auto classes of transformers whose models can have a decoder, the most specific first
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)


def architecture(config: Any) -> str:
    """The class name in `architectures` of `config`; empty where there is none."""
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list | tuple) and names else ""
    return name if isinstance(name, str) else ""


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that `architectures` of `config` names, or the auto class that finds it.

    A name that transformers does not know, or that belongs to another kind of config, gives the
    causal language model of the config's `model_type`. Raises InputError for encoder-decoder
    models.
    """
    name = architecture(config)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name or config.model_type} is an encoder-decoder model, which lrcompress does not "
            "compress: give a model that only decodes"
        )
    if trust_remote_code and (auto_class := _auto_class_of_code(config, name)):
        return auto_class
    stock: Any = getattr(transformers, name, None) if name else None
    is_model = isinstance(stock, type) and issubclass(stock, PreTrainedModel)
    if is_model and isinstance(config, stock.config_class or ()):
        return stock
    return AutoModelForCausalLM


def _auto_class_of_code(config: Any, name: str) -> Any:
    """The auto class for which `auto_map` of `config` names the custom class called `name`."""
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, dict):
        return None
    auto_classes = [key for key, path in auto_map.items() if str(path).endswith(f".{name}")]
    known = [key for key in AUTO_CLASSES if key in auto_classes]
    return getattr(transformers, known[0]) if known else None


def build(config: Any, trust_remote_code: bool) -> Any:
    """A model of the class of `config` with new weights, on torch's current device."""
    class_to_build = model_class(config, trust_remote_code)
    if issubclass(class_to_build, PreTrainedModel):
        return class_to_build._from_config(config)
    return class_to_build.from_config(config, trust_remote_code=trust_remote_code)


def auto_classes(model: Any) -> list[str]:
    """The auto classes of transformers by which users load a model of the class of `model`."""
    names = [name for name in AUTO_CLASSES if _loads(getattr(transformers, name), model)]
    if getattr(model, "_auto_class", None):
        names.append(model._auto_class)
    if predicts_next_token(model):
        names.append("AutoModelForCausalLM")
    return list(dict.fromkeys(names))


def _loads(auto_class: Any, model: Any) -> bool:
    stock = auto_class._model_mapping.get(type(model.config), None)
    return type(model) in (stock if isinstance(stock, tuple) else (stock,))
