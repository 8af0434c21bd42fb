"""Checks that a checkpoint, or a GGUF export, is as it was saved.

Files are compared by checksum, and the tensors of a checkpoint with its config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint.export.gguf_seal import is_sealed
from lrcompress.checkpoint.folder import checksums
from lrcompress.checkpoint.record import RECORD, read_record
from lrcompress.models import loading
from lrcompress.models.safetensors_headers import stored_tensors
from lrcompress.runtime.errors import InputError

CODE_NOT_RUN = "its code is not run without --trust-remote-code"
FaultKind = Literal["missing", "extra", "size", "checksum", "model"]

# dtype in config.json -> its name in safetensors files
SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class FileChecksum:
    """Size and checksum of a file, as the record states them or as they are on disk."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a checkpoint, or with the whole model (then `file` is ".")."""

    file: str
    kind: FaultKind
    message: str


@dataclass(frozen=True)
class Verification:
    """The result for one checkpoint, or for one GGUF file, which then is `folder`: numbers of files
    and bytes read, and all faults.

    `unchecked` says why the model was not loaded, if it was not.
    """

    folder: str
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    unchecked: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: Path, trust_remote_code: bool = False) -> list[Verification]:
    """Verifies the checkpoint in `folder`, every checkpoint in the folder of a run, or an exported
    GGUF file.

    If all files are right, the model is also loaded, on the meta device, without memory for its
    weights; one that ships its own code, such as a standalone export, only with
    `trust_remote_code`. Raises InputError where there is no checkpoint, or one without checksums.
    """
    if folder.is_file():
        return [_verify_file(folder)]
    return [_verify_checkpoint(path, trust_remote_code) for path in _checkpoints(folder)]


def _verify_file(file: Path) -> Verification:
    message = f"{file.name} has changed since it was exported"
    faults = () if is_sealed(file) else (Fault(file.name, "checksum", message),)
    return Verification(str(file), 1, file.stat().st_size, faults, unchecked=None)


def _checkpoints(folder: Path) -> list[Path]:
    if (folder / RECORD).is_file():
        return [folder]
    checkpoints = sorted(file.parent for file in folder.glob(f"[!.]*/{RECORD}"))
    if not checkpoints:
        raise InputError(
            f"{str(folder)!r} is no checkpoint of lrcompress, nor a run with one: give a folder "
            f"with a {RECORD}, or a file of export --to gguf"
        )
    return checkpoints


def _verify_checkpoint(folder: Path, trust_remote_code: bool) -> Verification:
    saved = _saved_checksums(folder)
    current = {name: FileChecksum(**values) for name, values in checksums(folder).items()}
    faults = tuple(_file_faults(saved, current))
    unchecked = "files are wrong" if faults else None
    if not faults:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        faults = tuple(_dtype_faults(folder, config.get("dtype")))
        if "auto_map" in config and not trust_remote_code:
            unchecked = CODE_NOT_RUN
        else:
            faults += tuple(_model_faults(folder, trust_remote_code))
    return Verification(
        folder=str(folder),
        files=len(current),
        bytes=sum(file.bytes for file in current.values()),
        faults=faults,
        unchecked=unchecked,
    )


def _saved_checksums(folder: Path) -> dict[str, FileChecksum]:
    """The checksums in the record; InputError where it has none."""
    record = read_record(folder) or {}
    if "files" not in record:
        raise InputError(
            f"{str(folder / RECORD)!r} holds no checksums: load the model and save it "
            "again with lrcompress"
        )
    try:
        return TypeAdapter(dict[str, FileChecksum]).validate_python(record["files"])
    except ValidationError:
        raise InputError(
            f"the checksums in {str(folder / RECORD)!r} are damaged: restore it"
        ) from None


def _file_faults(
    saved: Mapping[str, FileChecksum], current: Mapping[str, FileChecksum]
) -> Iterator[Fault]:
    for name, before in saved.items():
        now = current.get(name)
        if now is None:
            yield Fault(name, "missing", f"{name} is missing")
        elif now.bytes != before.bytes:
            sizes = f"{now.bytes:,} bytes and was saved with {before.bytes:,}"
            yield Fault(name, "size", f"{name} has {sizes}")
        elif now.sha256 != before.sha256:
            yield Fault(name, "checksum", f"{name} has changed since it was saved")
    for name in sorted(current.keys() - saved.keys()):
        yield Fault(name, "extra", f"{name} is not a file of the checkpoint")


def _model_faults(folder: Path, trust_remote_code: bool) -> Iterator[Fault]:
    """Tensors whose shape or rank does not fit the config, or that are missing or left over."""
    try:
        loading.load(
            folder, trust_remote_code=trust_remote_code, placement={"device_map": {"": "meta"}}
        )
    except InputError as error:
        yield Fault(".", "model", str(error))


def _dtype_faults(folder: Path, dtype: str | None) -> Iterator[Fault]:
    """Floating-point tensors that have neither the model's dtype nor float32: some families keep a
    few weights in float32 for every dtype."""
    if dtype not in SAFETENSORS_DTYPES:
        return
    other_dtypes = set(SAFETENSORS_DTYPES.values()) - {SAFETENSORS_DTYPES[dtype], "F32"}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in stored_tensors([file]).items():
            if tensor.dtype in other_dtypes:
                message = f"{name} is stored as {tensor.dtype} and config.json says {dtype}"
                yield Fault(file.name, "model", message)
