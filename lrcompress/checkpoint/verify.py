"""Is a checkpoint what was saved: every file by its checksum, every tensor by the config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint.export.standalone import STANDALONE
from lrcompress.checkpoint.folder import checksums
from lrcompress.checkpoint.record import RECORD, read_record
from lrcompress.models import loading
from lrcompress.models.safetensors_headers import stored_tensors
from lrcompress.runtime.errors import InputError

Kind = Literal["missing", "extra", "size", "checksum", "model"]


# dtypes of config.json -> as safetensors calls them
TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class File:
    """What the record says of a file, and what is so."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a checkpoint, or with its model as a whole (`file` ".")."""

    file: str
    kind: Kind
    message: str


@dataclass(frozen=True)
class Verified:
    """One checkpoint: how much was read, and every fault found."""

    folder: str
    files: int
    bytes: int
    faults: tuple[Fault, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: Path) -> list[Verified]:
    """The checkpoint in `folder`, or each of those in the folder of a run.

    A model is loaded without memory for its weights once all its files are right. Raises
    InputError where there is no checkpoint, or one without checksums.
    """
    return [_verified(one) for one in _checkpoints(folder)]


def _checkpoints(folder: Path) -> list[Path]:
    if (folder / RECORD).is_file():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"[!.]*/{RECORD}"))
    if not found:
        raise InputError(
            f"{str(folder)!r} is no checkpoint of lrcompress, nor a run with one: give a folder "
            f"with a {RECORD}"
        )
    return found


def _verified(folder: Path) -> Verified:
    saved = _recorded(folder)
    here = {name: File(**one) for name, one in checksums(folder).items()}
    faults = tuple(_file_faults(saved, here)) or tuple(_model_faults(folder))
    return Verified(str(folder), len(here), sum(one.bytes for one in here.values()), faults)


def _recorded(folder: Path) -> dict[str, File]:
    record = read_record(folder) or {}
    if "files" not in record:
        raise InputError(
            f"{str(folder / RECORD)!r} holds no checksums: load the model and save it "
            "again with lrcompress"
        )
    try:
        return TypeAdapter(dict[str, File]).validate_python(record["files"])
    except ValidationError:
        raise InputError(
            f"the checksums in {str(folder / RECORD)!r} are damaged: restore it"
        ) from None


def _file_faults(saved: Mapping[str, File], here: Mapping[str, File]) -> Iterator[Fault]:
    for name, was in saved.items():
        now = here.get(name)
        if now is None:
            yield Fault(name, "missing", f"{name} is missing")
        elif now.bytes != was.bytes:
            sizes = f"{now.bytes:,} bytes and was saved with {was.bytes:,}"
            yield Fault(name, "size", f"{name} has {sizes}")
        elif now.sha256 != was.sha256:
            yield Fault(name, "checksum", f"{name} has another content than it was saved with")
    for name in sorted(here.keys() - saved.keys()):
        yield Fault(name, "extra", f"{name} is no file of the checkpoint")


def _model_faults(folder: Path) -> Iterator[Fault]:
    """Of shapes, ranks and types, which loading checks against the config. A standalone export is
    left out: it would run code that is in the folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if STANDALONE in config:
        return
    yield from _other_types(folder, config.get("dtype"))
    try:
        loading.load(folder, placement={"device_map": {"": "meta"}})
    except InputError as error:
        yield Fault(".", "model", str(error))


def _other_types(folder: Path, dtype: str | None) -> Iterator[Fault]:
    """Some families keep a few weights in float32 whatever the model's own dtype is."""
    if dtype not in TYPES:
        return
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in stored_tensors([file]).items():
            if tensor.dtype in set(TYPES.values()) - {TYPES[dtype], "F32"}:
                said = f"{name} is stored as {tensor.dtype} and config.json says {dtype}"
                yield Fault(file.name, "model", said)
