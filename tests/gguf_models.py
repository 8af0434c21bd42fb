"""Narrowed tiny models, synthetic GGUF files of their dense models, and llama.cpp to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor, nn
from torch.nn import functional

from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import NarrowedLinear, dense_weight, install
from lrcompress.methods.types import LinearSpec
from tests.tiny import LENGTH, byte_tokenizer, tokens

# llama.cpp's server answers in whole UTF-8 characters, so tests let it choose letters
LETTER = byte_tokenizer()("a")["input_ids"][0]
# what llama.cpp fixes for a family -> the config keys that say the same
FIXED: dict[str, dict[str, Any]] = {
    # the scale of attention is that of the head
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    # all heads have keys of their own
    "gpt_neox": {"num_key_value_heads": 4},
}


def narrow(model: Any, widths: Sequence[int]) -> Any:
    """`model` with the first channels of each block's FFN, as many as `widths` says."""
    for spec in find_ffns(model).linears:
        _narrow_linear(model, spec, widths[spec.block])
    return model


def _narrow_linear(model: Any, spec: LinearSpec, width: int) -> None:
    layer: Any = model.get_submodule(spec.name)
    weight, bias = dense_weight(layer), layer.bias
    if spec.role == "down":
        weight = weight[:, :width]
    else:
        halves = 2 if spec.role == "gate_up" else 1
        weight = torch.cat([half[:width] for half in weight.chunk(halves)])
        bias = None if bias is None else torch.cat([b[:width] for b in bias.chunk(halves)])
    rows, columns = weight.shape
    narrowed = NarrowedLinear(columns, rows, bias is not None, type(layer))
    with torch.no_grad():
        narrowed.weight.copy_(weight)
        if bias is not None:
            narrowed.bias.copy_(bias)
    install(model, spec.name, narrowed)


def write_donor(file: Path, config: Any, architecture: str, **changes: Any) -> Path:
    """A GGUF file with the metadata of a dense model and one tensor; `changes` of metadata."""
    writer = GGUFWriter(file, architecture)
    for key, value in (_metadata(config, architecture) | changes).items():
        _add(writer, key, value)
    writer.add_name("tiny")
    writer.add_size_label("8B")
    writer.add_file_type(1)
    writer.add_chat_template("{{ messages[0].content }}")
    _add_tokenizer(writer)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    key = f"{writer.arch}.{key}"
    add: Callable[[str, Any], None]
    match value:
        case None:
            return
        case bool():
            add = writer.add_bool
        case int():
            add = writer.add_uint32
        case float():
            add = writer.add_float32
        case _:
            add = writer.add_array
    add(key, value)


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    """What convert_hf_to_gguf.py of llama.cpp writes, by the part of the key after the family's."""

    def first(*names: str) -> Any:
        return next((v for name in names if (v := getattr(config, name, None)) is not None), None)

    rope = first("rope_parameters") or {}
    heads = config.num_attention_heads
    head = first("head_dim") or config.hidden_size // heads
    share = rope.get("partial_rotary_factor", 1.0)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": LENGTH,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 88,
        "vocab_size": config.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": first("num_key_value_heads"),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": first(
            "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"
        ),
        "attention.sliding_window": first("sliding_window"),
        "attn_logit_softcapping": first("attn_logit_softcapping"),
        "final_logit_softcapping": first("final_logit_softcapping"),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "rope.dimension_count": int(head * share),
        "rope.scaling.original_context_length": LENGTH if architecture == "phi3" else None,
        "use_parallel_residual": first("use_parallel_residual"),
        "embedding_scale": first("embedding_multiplier"),
        "residual_scale": first("residual_multiplier"),
        "logit_scale": first("logits_scaling", "logit_scale"),
        "attention.scale": first("attention_multiplier"),
        "attention.max_alibi_bias": 8.0 if architecture == "mpt" else None,
    }


def _add_tokenizer(writer: GGUFWriter) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens[-1] = "ab"  # because both programs want at least one merge
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


class LlamaCpp:
    """A GGUF file in llama.cpp: one thread, attention and its cache in float32."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = LENGTH, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = parameters.fit_params = False
        parameters.verbosity = -1
        flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = flash  # its float16 would change logits by 0.01
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(parameters)

    def logprobs(self, prompt: Sequence[int], vocabulary: int = 257) -> Tensor:
        """Log-probabilities (vocabulary,) of the token after `prompt`."""
        answer = self._complete(prompt, n_predict=1, n_probs=vocabulary, logit_bias=[[LETTER, 100]])
        (position,) = answer["logprobs"]["content"]
        values = torch.full((vocabulary,), torch.nan)
        for entry in position["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values

    def text(self, prompt: Sequence[int], count: int) -> str:
        """`count` letters, each the most probable one."""
        others = [[token, False] for token in range(257) if not LETTER <= token < LETTER + 26]
        return str(self._complete(prompt, n_predict=count, logit_bias=others)["text"])

    def _complete(self, prompt: Sequence[int], **request: Any) -> Any:
        request |= {"prompt": list(prompt), "temperature": 0, "cache_prompt": False}
        return self.server.handle_completions(request)["choices"][0]


class TabledGelu(nn.Module):
    """GELU as llama.cpp computes it on a CPU: from a table of all numbers of float16."""

    def forward(self, x: Tensor) -> Tensor:
        entries = functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, entries, x.relu())


def with_tabled_gelu(model: Any) -> Any:
    """`model` with TabledGelu in the place of every GELU."""
    for name, module in list(model.named_modules()):
        if "gelu" in type(module).__name__.lower():
            model.set_submodule(name, TabledGelu())
    return model


def differences(model: Any, file: Path, lengths: Sequence[int] = (1, 7, 40)) -> list[float]:
    """The largest difference of log-probabilities between `model` and llama.cpp, for likely tokens
    after prompts of several lengths."""
    llama, (prompt, *_) = LlamaCpp(file), tokens(1, max(lengths))
    with torch.no_grad():
        expected = model(input_ids=prompt[None]).logits[0].log_softmax(-1)
    largest = list[float]()
    for length in lengths:
        likely = expected[length - 1] > -12
        answer = llama.logprobs(prompt[:length].tolist())
        largest.append(float((answer - expected[length - 1])[likely].abs().max()))
    return largest


def largest_difference(model: Any, file: Path) -> float:
    """The largest of `differences`."""
    return max(differences(model, file))


def architecture_of(file: Path) -> str:
    return str(metadata(file)["general.architecture"])


def metadata(file: Path) -> dict[str, Any]:
    """All metadata of a GGUF file."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}
