"""The on-disk form: an ordinary Hugging Face folder with its provenance beside the weights."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lrcompress.checkpoint.record import CARD, RECORD, write_record
from lrcompress.models.hf_quantizer import record_layout
from lrcompress.models.safetensors_headers import stored_tensors
from lrcompress.runtime.atomic_io import replace_text, writing
from lrcompress.runtime.packages import versions

# parts that only a low-rank layer has
OWN = (".A.weight", ".Z.weight")
QDATA = "._weight_qdata"


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    out: Path,
    record: Mapping[str, Any],
    replace: bool = False,
    state: Mapping[str, Tensor] | None = None,
    shards: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes model, tokenizer, provenance and model card to the folder `out`.

    `record` is completed with versions and the counts of what was saved, and returned. `state` has
    the weights where the model holds only a part of them; `shards` are files with others, which
    stay where they are. Raises
    InputError if `out` exists and is not to be replaced, MachineError if it cannot be written.
    """
    record_layout(model)
    with writing(out, replace) as folder:
        write_weights(model, tokenizer, folder, state)
        if shards:
            _join(folder, shards)
        complete = dict(record) | saved_as(folder)
        write_record(folder, complete)
    return complete


def saved_as(folder: Path) -> dict[str, Any]:
    """What the record says of the files in `folder`: versions, counts and checksums."""
    return {
        "versions": versions(),
        "saved": saved_tensors(folder),
        "files": checksums(folder),
    }


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file by its path in `folder`, but of hidden ones, the record, and
    the card, which is the reader's to edit."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if str(name) not in (RECORD, CARD) and not name.parts[0].startswith("."):
            with file.open("rb") as content:
                mark = hashlib.file_digest(content, "sha256").hexdigest()
            found[name.as_posix()] = {"bytes": file.stat().st_size, "sha256": mark}
    return found


def write_weights(
    model: Any, tokenizer: Any, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes model and tokenizer as transformers does; `state` as in `save_checkpoint`."""
    config = model.config.__dict__
    config.pop("auto_map", None)  # it would point at code that is not in this folder
    model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def _join(folder: Path, shards: Sequence[Path]) -> None:
    """Puts `shards` beside the weights in `folder`, and writes the index of all."""
    own = sorted(folder.glob("*.safetensors"))
    places: dict[str, str] = {}
    size, total = 0, len(own) + len(shards)
    for number, file in enumerate((*own, *shards), 1):
        named = folder / f"model-{number:05}-of-{total:05}.safetensors"
        if file in own:
            file.replace(named)
        else:
            _link(file, named)
        places |= dict.fromkeys(stored_tensors([named]), named.name)
        size += named.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    replace_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _link(file: Path, other: Path) -> None:
    """The same content without a copy, where the file system can; `file` stays if all fails."""
    try:
        other.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, other)
    other.chmod(0o644)


def saved_tensors(folder: Path) -> dict[str, int]:
    """Numbers and bytes in the safetensors files of `folder`.

    The numbers leave out format guards and the index vectors of the pivoted form.
    """
    files = sorted(folder.glob("*.safetensors"))
    shapes = _parameters({key: one.shape for key, one in stored_tensors(files).items()})
    beside = {key.removesuffix(end) for key in shapes for end in OWN if key.endswith(end)}
    passive = {f"{name}.{buffer}" for name in beside for buffer in ("weight", "order")}
    passive |= {key for key, shape in shapes.items() if len(shape) > 1 and math.prod(shape) == 1}
    numbers = sum(math.prod(shape) for key, shape in shapes.items() if key not in passive)
    size = sum(file.stat().st_size for file in files)
    return {"parameters": numbers, "bytes": size}


def _parameters(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """By the names of parameters: torchao saves one in several tensors, of which one has an entry
    for each number."""
    quantized = {key.replace("_weight_qdata", "weight"): key for key in shapes if QDATA in key}
    parts = {key for key in shapes if "._weight_" in key}
    plain = {key: shape for key, shape in shapes.items() if key not in parts}
    return plain | {name: shapes[key] for name, key in quantized.items()}
