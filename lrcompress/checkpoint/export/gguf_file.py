"""Export to one GGUF file, for llama.cpp and the programs that are built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, size_label

from lrcompress.checkpoint.export.dense import pad
from lrcompress.checkpoint.export.gguf_donor import WIDTH, Donor, find_donor
from lrcompress.checkpoint.export.gguf_families import GgufFamily, family_of
from lrcompress.checkpoint.export.gguf_seal import BLANK, KEY, seal
from lrcompress.checkpoint.export.gguf_tensors import GgufTensor, gguf_tensors, group_size
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import LowRankLinear, compressed_layers, install
from lrcompress.layers.model_info import parameter_count
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.atomic_io import writing_file
from lrcompress.runtime.errors import InputError

FOR_GGUF = "factorize the dense model with --for gguf"


def export_gguf(
    model: Any,
    tokenizer: Any,
    out: Path,
    record: Mapping[str, Any],
    like: str | None = None,
    type: str = "f16",
) -> None:
    """Writes `out`, a GGUF file with the weights of `model` in `type`. `model` is changed.

    Metadata, tokenizer and chat template are those of the donor, a GGUF file of the dense model:
    `like`, or the file from which the model was compressed. A model whose FFNs have one width keeps
    its architecture; llama, mistral and qwen2 with several widths become `deci`. FFNs are filled
    with zeros up to a multiple of the type's group, which changes no output. Vectors stay in
    float32, rows that are no multiple of the group become float16, and the embedding and output
    layer are never below q8_0.

    Raises InputError where llama.cpp cannot compute the model, or the donor is not of this model.
    """
    kind = GGMLQuantizationType[type.upper()]
    family = family_of(model)
    _refuse_low_rank(model)
    linears = find_ffns(model).linears
    widths = _padded_widths(linears, group_size(kind))
    donor = Donor(find_donor(like, record))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    donor.check(model.config, tokenizer, vocabulary, family.architecture)
    if len(set(widths.values())) > 1:
        family = _with_widths_per_block(family, model, len(set(widths.values())))
    _pad_ffns(model, linears, widths)
    with writing_file(out) as file, closing(GGUFWriter(file, family.architecture)) as writer:
        _add_metadata(writer, donor, record, kind)
        _add_widths(writer, list(widths.values()))
        writer.add_size_label(size_label(parameter_count(model), 0, 0, 0))
        _write(writer, list(gguf_tensors(model, family, kind)), donor)
        writer.close()
        seal(file)


def _refuse_low_rank(model: Any) -> None:
    names = [name for name, layer in compressed_layers(model) if isinstance(layer, LowRankLinear)]
    if names:
        raise InputError(
            f"{len(names)} linears are low rank, such as {names[0]}, and llama.cpp has no such "
            f"layers: {FOR_GGUF}"
        )


def _padded_widths(linears: Sequence[LinearSpec], multiple: int) -> dict[int, int]:
    """Block -> width of its FFN, rounded up to a multiple of `multiple`."""
    return {s.block: s.in_features + -s.in_features % multiple for s in linears if s.role == "down"}


def _with_widths_per_block(family: GgufFamily, model: Any, count: int) -> GgufFamily:
    if family.per_block_width is None:
        raise InputError(
            f"the FFNs of this {model.config.model_type!r} have {count} different widths, and "
            f"llama.cpp reads one for all of them: {FOR_GGUF}"
        )
    return family.with_widths_per_block()


def _pad_ffns(model: Any, linears: Sequence[LinearSpec], widths: Mapping[int, int]) -> None:
    """Makes all FFN linears stock layers of the width of their block."""
    for name, layer in list(compressed_layers(model)):
        install(model, name, layer.to_dense())
    for spec in linears:
        width = widths[spec.block]
        rows = 2 * width if spec.role == "gate_up" else width
        is_down = spec.role == "down"
        pad(model, spec, (spec.out_features, width) if is_down else (rows, spec.in_features))


def _add_metadata(
    writer: GGUFWriter, donor: Donor, record: Mapping[str, Any], kind: GGMLQuantizationType
) -> None:
    writer.add_string(KEY, BLANK)  # first, so that it is found at once
    writer.add_string("lrcompress.version", version("lrcompress"))
    writer.add_string("lrcompress.source", str(record.get("source")))
    donor.copy_metadata(writer)
    writer.add_file_type(_file_type(kind))
    if group_size(kind) > 1:
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _file_type(kind: GGMLQuantizationType) -> LlamaFileType:
    is_float32 = kind == GGMLQuantizationType.F32
    return LlamaFileType[f"{'ALL' if is_float32 else 'MOSTLY'}_{kind.name}"]


def _add_widths(writer: GGUFWriter, widths: Sequence[int]) -> None:
    key = f"{writer.arch}.{WIDTH}"
    if len(set(widths)) == 1:
        writer.add_uint32(key, widths[0])
    else:
        writer.add_array(key, widths)


def _write(writer: GGUFWriter, tensors: Sequence[GgufTensor], donor: Donor) -> None:
    """Writes the file; one tensor at a time is converted in memory."""
    bytes_type, constants = np.dtype(np.uint8), list(donor.constant_tensors())
    for tensor in tensors:
        shape = tensor.byte_shape
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, bytes_type, size, tensor.type)
    for constant in constants:
        data = constant.data
        writer.add_tensor_info(
            constant.name, data.shape, data.dtype, data.nbytes, constant.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
    for constant in constants:
        writer.write_tensor_data(constant.data)
