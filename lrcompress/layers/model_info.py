"""Facts about a loaded model: parameters, bytes, maximum length, kind, and quantization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrcompress.layers.lowrank import is_compressed
from lrcompress.runtime.errors import InputError

# tokens of a sequence where the user gives no length
DEFAULT_LENGTH = 1024
# config keys for the maximum number of positions; families differ
MAXIMUM_LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions")


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def embedding_count(model: Any) -> int:
    """Number of parameters of the token embedding and the output layer; tied ones count once."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    return sum(int(weight.numel()) for weight in weights.values())


def config_number(model: Any, key: str) -> int:
    """The value of `key` in the config of the language model, the largest of a list by block.

    0 where it has none: configs with code of their own name things otherwise.
    """
    value = getattr(model.config.get_text_config(decoder=True), key, None)
    numbers = value if isinstance(value, list | tuple) else [value]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def hidden_size(model: Any) -> int:
    """The width of the hidden states; that of the embedding where the config does not name it."""
    width = config_number(model, "hidden_size")
    return width or int(model.get_input_embeddings().weight.shape[1])


def maximum_length(model: Any) -> int | None:
    """The maximum sequence length in tokens; None where the config has none."""
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, key, None) for key in MAXIMUM_LENGTH_KEYS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def sequence_length(model: Any, requested: int | None) -> int:
    """The number of tokens to use: `requested`, or by default 1024 or the model's maximum if lower.

    Raises InputError where `requested` exceeds the model's maximum.
    """
    limit = maximum_length(model)
    if requested is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and requested > limit:
        raise InputError(f"a length of {requested} tokens exceeds the model's maximum of {limit}")
    return requested


def model_kind(model: Any, trained: bool = False) -> str:
    """The name of the model's kind in reports, such as "dense" or "quantized finetuned".

    `trained` tells a finetuned model from a factorized one.
    """
    name = ("finetuned" if trained else "factorized") if is_compressed(model) else "dense"
    return f"quantized {name}" if is_quantized(model) else name


def predicts_next_token(model: Any) -> bool:
    """Whether the output of `model` is logits of the next token, and not classes or states."""
    # code of a model's own can lack what transformers recognizes
    is_generative = model.can_generate() or model._auto_class == "AutoModelForCausalLM"
    return is_generative and not getattr(model.config, "is_encoder_decoder", False)


def check_predicts_next_token(model: Any, purpose: str) -> None:
    """Raises InputError where `model` has no logits of the next token, which `purpose` needs."""
    if not predicts_next_token(model):
        raise InputError(
            f"{purpose} needs logits of the next token, which {type(model).__name__} does not have"
        )


def plain_model(model: Any) -> Any:
    """`model`, or the model inside where torch.compile wrapped it.

    Raises InputError where it has adapters of peft or compiled modules, which change the names and
    the meaning of its weights.
    """
    model = getattr(model, "_orig_mod", model)
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise InputError(
                f"the model has adapters of peft ({type(module).__name__}): merge them into its "
                "weights first, with `model = model.merge_and_unload()`"
            )
        if hasattr(module, "_orig_mod"):
            raise InputError(
                f"the module {name} is compiled, which changes the names of its weights: put its "
                "`_orig_mod` in its place first, and compile again afterwards"
            )
    return model


def is_quantized(model: Any) -> bool:
    """Whether the weights of `model` are quantized, as loaded or by `lrcompress quantize`."""
    return getattr(model, "hf_quantizer", None) is not None


def refuse_quantized(model: Any, remedy: str) -> None:
    """Raises InputError with `remedy` where the weights of `model` are quantized."""
    if is_quantized(model):
        method = model.hf_quantizer.quantization_config.quant_method
        raise InputError(
            f"the model's weights are quantized ({getattr(method, 'value', method)}): {remedy}"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; tied ones count once, quantized ones with their scales."""
    return sum(map(_bytes, model.parameters()))


def _bytes(tensor: Tensor) -> int:
    # a quantized tensor is a subclass that consists of ordinary tensors
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
