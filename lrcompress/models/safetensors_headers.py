"""What the safetensors files of a model say of themselves, before a number of them is read."""

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

FLOATS = ("F", "BF")  # with which the names of floating-point types begin
INTEGERS = ("I32", "I64")
# parts of a low-rank layer beside each other, by the ending of one that only it has
LAYERS = {".A.weight": (".B.weight", ".B.bias"), ".Z.weight": (".C.weight", ".C.bias")}
GUARD, ORDER = ".weight", ".order"


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its type as safetensors calls it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(FLOATS)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; none where there is neither one nor an index.

    Raises InputError where the index is damaged, or names what is no file of `folder`.
    """
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        places = read_object(index).get("weight_map")
    except ValueError as error:
        raise InputError(f"{str(index)!r} is damaged ({error}): get an intact copy") from None
    if not isinstance(places, dict):
        raise InputError(f"{str(index)!r} is damaged (no weight_map): get an intact copy")
    for name in places.values():
        if not (isinstance(name, str) and is_inside(name) and (folder / name).is_file()):
            raise InputError(
                f"{str(index)!r} names {name!r}, which is no file of its folder: get an intact copy"
            )
    return [folder / name for name in sorted(set(places.values()))]


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """By name, from the headers alone; safetensors' own error where one is damaged."""
    found: dict[str, Stored] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call,unused-ignore]
            for name in tensors.keys():  # noqa: SIM118
                one = tensors.get_slice(name)
                found[name] = Stored(one.get_dtype(), tuple(one.get_shape()))
    return found


def numbers(stored: Mapping[str, Stored]) -> int:
    return sum(prod(one.shape) for one in stored.values())


def check_types(stored: Mapping[str, Stored]) -> None:
    """Raises InputError that names the low-rank layer whose parts are not of one type of floating
    point, or whose order is not of integers."""
    for name, one in stored.items():
        end = next((end for end in LAYERS if name.endswith(end)), None)
        if end is None:
            continue
        layer = name.removesuffix(end)
        parts = (one, *(stored.get(layer + part) for part in (*LAYERS[end], GUARD)))
        types = {part.dtype for part in parts if part is not None}
        if len(types) > 1 or not one.is_float:
            raise InputError(
                f"the weights of {layer} are stored as {', '.join(sorted(types))}, and not all as "
                "one type of floating point: get an intact copy"
            )
        order = stored.get(layer + ORDER)
        if order is not None and order.dtype not in INTEGERS:
            raise InputError(
                f"the order of {layer} is stored as {order.dtype}, not as integers: get an intact "
                "copy"
            )
