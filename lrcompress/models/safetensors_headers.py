"""Reads and checks the headers of a model's safetensors files, without reading weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import is_inside
from lrcompress.runtime.safe_parsing import read_object

FLOAT_PREFIXES = ("F", "BF")
ORDER_DTYPES = ("I32", "I64")
# the tensor that identifies a low-rank layer -> the layer's other tensors of floating point;
# ".weight" is the guard buffer
LAYER_TENSORS = {
    ".A.weight": (".B.weight", ".B.bias", ".weight"),
    ".Z.weight": (".C.weight", ".C.bias", ".weight"),
}


@dataclass(frozen=True)
class StoredTensor:
    """The header of a tensor in a file: dtype by its safetensors name (such as BF16), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(FLOAT_PREFIXES)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read; none where `folder` has none.

    Raises InputError where the index is damaged, or lists a file that is not in `folder`.
    """
    single_file, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single_file.is_file():
        return [single_file]
    if not index.is_file():
        return []
    try:
        weight_map = read_object(index).get("weight_map")
    except ValueError as error:
        raise InputError(f"{str(index)!r} is damaged ({error}): get an intact copy") from None
    if not isinstance(weight_map, dict):
        raise InputError(f"{str(index)!r} is damaged (no weight_map): get an intact copy")
    for name in weight_map.values():
        if not (isinstance(name, str) and is_inside(name) and (folder / name).is_file()):
            raise InputError(
                f"{str(index)!r} names {name!r}, which is not a file in its folder: get an intact "
                "copy"
            )
    return [folder / name for name in sorted(set(weight_map.values()))]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Dtype and shape of every tensor by name. A damaged header raises safetensors' own error."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call,unused-ignore]
            for name in tensors.keys():  # noqa: SIM118
                header = tensors.get_slice(name)
                stored[name] = StoredTensor(header.get_dtype(), tuple(header.get_shape()))
    return stored


def element_count(stored: Mapping[str, StoredTensor]) -> int:
    return sum(prod(tensor.shape) for tensor in stored.values())


def check_dtypes(stored: Mapping[str, StoredTensor]) -> None:
    """Raises InputError with the name of a low-rank layer whose tensors have invalid dtypes.

    All weights of a layer need one floating-point dtype; its `order` needs an integer dtype.
    """
    for name, tensor in stored.items():
        suffix = next((suffix for suffix in LAYER_TENSORS if name.endswith(suffix)), None)
        if suffix is None:
            continue
        layer = name.removesuffix(suffix)
        others = (stored.get(layer + other) for other in LAYER_TENSORS[suffix])
        dtypes = {tensor.dtype, *(other.dtype for other in others if other is not None)}
        if len(dtypes) > 1 or not tensor.is_float:
            raise InputError(
                f"the weights of {layer} are stored as {', '.join(sorted(dtypes))}, and not all as "
                "one type of floating point: get an intact copy"
            )
        order = stored.get(f"{layer}.order")
        if order is not None and order.dtype not in ORDER_DTYPES:
            raise InputError(
                f"the order of {layer} is stored as {order.dtype}, not as integers: get an intact "
                "copy"
            )
