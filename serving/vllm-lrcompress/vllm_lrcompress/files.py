"""Checks the files of a checkpoint folder before vLLM builds the model.

Only headers of safetensors files and the `order` of pivoted layers are read. Nothing here needs
vLLM or torch.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lrcompress.records import (
    INTACT,
    CheckpointError,
    ExpectedTensors,
    LinearRecord,
    bad_order,
)

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = {"I32": "i", "I64": "q"}
# tensors that every low-rank layer has one of, beside its guard
PARTS = (".A.weight", ".Z.weight")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its bytes are those from `start` to `end` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_folder(folder: Path, records: Mapping[str, LinearRecord]) -> None:
    """Raises CheckpointError where the files of `folder` do not hold what `records` name."""
    tensors = stored_tensors(folder)
    for record in records.values():
        _check_tensors(record, tensors)
    _check_unrecorded(records, tensors)
    _check_count(folder, records, tensors)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of a folder by its name."""
    index = folder / INDEX
    located = _read_json(index).get("weight_map", {}) if index.exists() else {}
    files = sorted(set(located.values())) or sorted(
        file.name for file in folder.glob("*.safetensors")
    )
    if not files:
        raise CheckpointError(f"{folder}: it has no safetensors files: {INTACT}")
    tensors = {name: t for file in files for name, t in _read_header(folder / file)}
    for name, file in located.items():
        if name not in tensors:
            raise CheckpointError(f"{file}: {name} missing, which {INDEX} names: {INTACT}")
    return tensors


def _read_header(file: Path) -> Iterable[tuple[str, StoredTensor]]:
    """The format: github.com/huggingface/safetensors, a length of 8 bytes, JSON, the tensors."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            header = json.loads(stream.read(length) if length <= size else b"")
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = {
            name: StoredTensor(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file.name}: missing in {file.parent}: {INTACT}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CheckpointError(f"{file.name}: its header is damaged: {INTACT}") from None
    if size != max((tensor.end for tensor in tensors.values()), default=base):
        raise CheckpointError(f"{file.name}: it is cut off or has been changed: {INTACT}")
    return tensors.items()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name}: it is damaged: {INTACT}")
    return content


def _check_tensors(record: LinearRecord, tensors: Mapping[str, StoredTensor]) -> None:
    shapes = record.tensors()
    if f"{record.name}.{record.bias}" in tensors:  # only the model knows whether it has one
        shapes[record.bias] = (record.out_features,)
    expected = ExpectedTensors(record.name, shapes)
    for path in shapes:
        tensor = tensors.get(f"{record.name}.{path}")
        if tensor is not None:
            expected.receive(path, tensor.shape)
            _check_dtype(record, path, tensor)
    expected.require_all()
    if record.form == "pivoted":
        _check_order(record, tensors[f"{record.name}.order"])


def _check_dtype(record: LinearRecord, path: str, tensor: StoredTensor) -> None:
    allowed = tuple(INTEGERS) if path == "order" else FLOATS
    if tensor.dtype not in allowed:
        raise CheckpointError(
            f"{record.name}: {path} has type {tensor.dtype}, not {' or '.join(allowed)}: {INTACT}"
        )


def _check_order(record: LinearRecord, tensor: StoredTensor) -> None:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        order = array(INTEGERS[tensor.dtype], stream.read(tensor.end - tensor.start))
    if sorted(order) != list(range(record.in_features)):
        raise bad_order(record.name)


def _check_unrecorded(
    records: Mapping[str, LinearRecord], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuses low-rank layers in the files that config.json does not name."""
    for name in tensors:
        module = next((name.removesuffix(part) for part in PARTS if name.endswith(part)), None)
        guard = tensors.get(f"{module}.weight")
        if guard is not None and guard.shape == (1,) and module not in records:
            raise CheckpointError(
                f"{module}: it is low-rank in the files, and config.json does not name it: {INTACT}"
            )


def _check_count(
    folder: Path, records: Mapping[str, LinearRecord], tensors: Mapping[str, StoredTensor]
) -> None:
    """How many numbers there are in all has to be what lrcompress.json says, where there is one."""
    record = folder / "lrcompress.json"
    if not record.exists():
        return
    saved = _read_json(record).get("saved", {}).get("parameters")
    uncounted = _uncounted(records, tensors)
    stored = sum(math.prod(t.shape) for name, t in tensors.items() if name not in uncounted)
    if saved not in (None, stored):
        raise CheckpointError(
            f"{folder}: the files hold {stored} numbers and lrcompress.json says {saved}, so a "
            f"tensor is missing or changed: {INTACT}, or ask `lrcompress verify` what differs"
        )


def _uncounted(
    records: Mapping[str, LinearRecord], tensors: Mapping[str, StoredTensor]
) -> set[str]:
    """Guards and orders. Blocks that share a layer have these each, and its record names one."""
    low_rank = {_unnumbered(r.name) for r in records.values() if r.rank is not None}
    return {
        name
        for name, tensor in tensors.items()
        if _unnumbered(name.rpartition(".")[0]) in low_rank
        and (name.endswith(".order") or (name.endswith(".weight") and tensor.shape == (1,)))
    }


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)
