"""Writes a checkpoint: an ordinary Hugging Face folder with lrcompress.json beside the weights."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lrcompress.checkpoint.companions import copy_companions, source_folder
from lrcompress.checkpoint.record import CARD, RECORD, write_record
from lrcompress.layers.model_info import plain_model
from lrcompress.models.hf_quantizer import record_layout
from lrcompress.models.safetensors_headers import stored_tensors
from lrcompress.models.stored_weights import read_tensors, unused_tensors
from lrcompress.runtime.atomic_io import replace_text, writing
from lrcompress.runtime.packages import versions
from lrcompress.runtime.stage_costs import stage, stages_until_now

# name endings of tensors that only a low-rank layer has
LOW_RANK_ENDINGS = (".A.weight", ".Z.weight")
CARRIED = "carried.safetensors"  # file of tensors carried over, until all files are indexed
QUANTIZED_DATA = "._weight_qdata"  # ending of torchao's tensor with one entry per number


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    out: Path,
    record: Mapping[str, Any],
    replace: bool = False,
    state: Mapping[str, Tensor] | None = None,
    shards: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes model, tokenizer, lrcompress.json and model card to the folder `out`.

    Returns `record` with package versions, the counts and checksums of the saved files, and the
    costs of stages where they are recorded.

    state: weights to save, where the model itself holds only a part of them.
    shards: safetensors files with further weights, which are linked or copied into `out`.

    Raises InputError if `out` exists and `replace` is false, MachineError if it cannot be written.
    """
    model = plain_model(model)
    record_layout(model)
    with writing(out, replace) as folder:
        with stage("saving"):
            write_weights(model, tokenizer, folder, state)
            carried_over = add_from_source(model, folder, shards)
            complete = dict(record) | carried_over | saved_as(folder)
        complete |= stages_until_now()
        write_record(folder, complete)
    return complete


def saved_as(folder: Path) -> dict[str, Any]:
    """The part of a record that describes the files in `folder`: versions, counts, checksums."""
    return {
        "versions": versions(),
        "saved": saved_tensors(folder),
        "files": checksums(folder),
    }


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, by its path in `folder`.

    Left out are hidden files, the record, and the model card, which users may edit.
    """
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if str(name) not in (RECORD, CARD) and not name.parts[0].startswith("."):
            with file.open("rb") as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()
            files[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256}
    return files


def write_weights(
    model: Any,
    tokenizer: Any,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    module_names: bool = False,
) -> None:
    """Writes model and tokenizer as transformers does; `state` as in `save_checkpoint`.

    With `module_names` the tensors have the names that they have in the model, which transformers
    otherwise converts to those of the original checkpoint.
    """
    config = model.config.__dict__
    config.pop("auto_map", None)  # it would refer to code that is not in this folder
    model.save_pretrained(folder, state_dict=state, save_original_format=not module_names)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def add_from_source(model: Any, folder: Path, shards: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Adds to `folder` what the folder holds that `model` was loaded from, and `model` does not.

    These are the files of `copy_companions`, and tensors that the class of the model skips, which
    are carried over unchanged and named in the result, for the record. `shards` are added too.
    """
    source = source_folder(model)
    names: list[str] = []
    if source is not None:
        copy_companions(source, folder)
        names = sorted(unused_tensors(model, source))
    if source is not None and names:
        save_file(read_tensors(source, names), folder / CARRIED, {"format": "pt"})
    if shards or names:
        _add_shards(folder, shards)
    return {"carried_over": names} if names else {}


def _add_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Adds `shards` to the weights in `folder`, and writes the index of all weight files."""
    saved = sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    size, total = 0, len(saved) + len(shards)
    for number, file in enumerate((*saved, *shards), 1):
        shard = folder / f"model-{number:05}-of-{total:05}.safetensors"
        if file in saved:
            file.replace(shard)
        else:
            _link_or_copy(file, shard)
        weight_map |= dict.fromkeys(stored_tensors([shard]), shard.name)
        size += shard.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    replace_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
    target.chmod(0o644)


def saved_tensors(folder: Path) -> dict[str, int]:
    """Counts the parameters and the bytes in the safetensors files of `folder`.

    Guard tensors of the format and the index vectors of the pivoted form are not parameters.
    """
    files = sorted(folder.glob("*.safetensors"))
    shapes = _parameter_shapes({key: tensor.shape for key, tensor in stored_tensors(files).items()})
    low_rank_layers = {
        key.removesuffix(ending)
        for key in shapes
        for ending in LOW_RANK_ENDINGS
        if key.endswith(ending)
    }
    buffers = {f"{layer}.{name}" for layer in low_rank_layers for name in ("weight", "order")}
    buffers |= {key for key, shape in shapes.items() if len(shape) > 1 and math.prod(shape) == 1}
    if low_rank_layers:  # also of tied layers, whose factors are stored elsewhere
        buffers |= {
            k for k, shape in shapes.items() if math.prod(shape) == 1 and k.endswith(".weight")
        }
        buffers |= {key for key in shapes if key.endswith(".order")}
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if key not in buffers)
    return {"parameters": parameters, "bytes": sum(file.stat().st_size for file in files)}


def _parameter_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Shapes by parameter from shapes by tensor.

    torchao saves a quantized parameter as several tensors, of which only `QUANTIZED_DATA` has the
    parameter's shape.
    """
    quantized = {
        key.replace("_weight_qdata", "weight"): shape
        for key, shape in shapes.items()
        if QUANTIZED_DATA in key
    }
    plain = {key: shape for key, shape in shapes.items() if "._weight_" not in key}
    return plain | quantized
