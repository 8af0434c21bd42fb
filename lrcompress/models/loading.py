"""MODEL on the command line -> a transformers model and its tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrcompress.config import ModelSettings
from lrcompress.models.preflight import check_folder, meta_model
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.paths import is_inside, user_path

PACKAGE = "package:"
DTYPES = ("auto", "float32", "bfloat16", "float16")
PANIC = "PanicException"  # of the libraries in Rust, which is no Exception


@dataclass(frozen=True)
class Location:
    """What transformers' from_pretrained is given: a folder or hub id, and a file for GGUF."""

    path: str
    gguf_file: str | None = None

    def arguments(self, trust_remote_code: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        return found | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def locate(source: str, gguf_file: str | None = None) -> Location:
    """Finds MODEL: a folder, a .gguf file, a hub id, or package:NAME/FILE, a file that an
    installed Python package ships. Raises InputError where a local path leads nowhere."""
    path = _package_file(source) if source.startswith(PACKAGE) else user_path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model {source!r} is a file: give its folder, or a .gguf file")
        return Location(str(path.parent), path.name)
    if path.is_dir():
        return _local_folder(path, source, gguf_file)
    if source.startswith((PACKAGE, "/", ".", "~")) or source.endswith(".gguf"):
        raise InputError(
            f"model {source!r} does not exist: give a folder, a .gguf file or a hub id"
        )
    return Location(source, gguf_file)


def _package_file(source: str) -> Path:
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    if not is_inside(file):
        raise InputError(f"model {source!r} leads out of its package: name a file inside")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model {source!r}: no Python package {name!r} is installed here")
    return Path(spec.submodule_search_locations[0]) / file


def _local_folder(path: Path, source: str, gguf_file: str | None) -> Location:
    if gguf_file is not None:
        if not (is_inside(gguf_file) and (path / gguf_file).is_file()):
            raise InputError(f"model folder {source!r} has no GGUF file {gguf_file!r}")
    elif not (path / "config.json").is_file():
        raise InputError(
            f"model folder {source!r} has no config.json: give a Hugging Face model folder, or "
            "name a GGUF file with --gguf-file"
        )
    return Location(str(path), gguf_file)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """transformers' many ways to say that a model cannot be loaded -> one InputError."""
    try:
        yield
    except (InputError, MachineError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # each library has its own
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        if fault := machine_fault_reason(error):
            raise MachineError(f"model {source!r} cannot be loaded: {fault}") from error
        reason = " ".join(str(error).split())
        if "custom code" in reason:
            raise InputError(
                f"model {source!r} loads by code of its own, which is not run unasked: read the "
                "code, and if you trust it give --trust-remote-code (trust_remote_code in Python)"
            ) from error
        reason = reason[:300] or type(error).__name__
        local = Path(source).expanduser().exists() or source.startswith(PACKAGE)
        what = "cannot be loaded" if local else "is no folder here, and the hub did not give it"
        raise InputError(f"model {source!r} {what}: {reason}") from error


def load_config(source: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of MODEL, without its weights."""
    from transformers import AutoConfig

    location = locate(source, gguf_file)
    with _explained(source):
        return AutoConfig.from_pretrained(location.path, **location.arguments(trust_remote_code))


def load(
    source: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Loads (model, tokenizer) from a folder, a .gguf file or a hub id.

    A GGUF is de-quantized into an ordinary model. `device` is a torch device or `auto`: GPUs,
    spread over several by accelerate where one does not hold the model, else the CPU. The
    tokenizer is None where the folder has none. `placement`, arguments of from_pretrained, takes
    the place of `device`. Only safetensors and GGUF weights are read.
    Raises InputError where the model is missing, unsupported, incomplete or damaged.
    """
    source, dtype = str(source), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    location = locate(source, gguf_file)
    with _explained(source):
        model = _load_model(location, dtype, placement or _placement(device), trust_remote_code)
        return model, _load_tokenizer(location, trust_remote_code)


def _load_model(
    location: Location, dtype: str, placement: Mapping[str, Any], trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    arguments = location.arguments(trust_remote_code)
    if location.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
        check_folder(location.path, trust_remote_code)
    model, report = AutoModelForCausalLM.from_pretrained(
        location.path,
        dtype=torch_dtype(dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named and refused below
        **arguments,
        **placement,
    )
    missing = sorted(report["missing_keys"])
    misshapen = sorted(key[0] for key in report["mismatched_keys"])
    for keys, fault in ((missing, "lacks"), (misshapen, "has in another shape")):
        if keys:
            raise InputError(
                f"model {location.path!r} {fault} {len(keys)} of the weights that its config.json "
                f"asks for, such as {keys[0]}: get an intact copy"
            )
    return model


def torch_dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _placement(device: str) -> dict[str, Any]:
    if device == "auto":
        return {"device_map": "auto"} if torch.cuda.is_available() else {}
    return {"device_map": {"": checked_device(device)}}


def checked_device(device: str) -> str:
    """`device` if it exists on this machine; raises InputError otherwise."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"device {device!r} is not available here: {reason}") from None
    return device


def load_tokenizer(source: str, gguf_file: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of MODEL, or in a folder by itself; None where the folder has none."""
    alone = user_path(source) if gguf_file is None else None
    found = alone is not None and alone.is_dir()
    location = Location(str(alone)) if found else locate(source, gguf_file)
    with _explained(source):
        return _load_tokenizer(location, trust_remote_code)


def _load_tokenizer(location: Location, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder = Path(location.path)
    if folder.is_dir() and not location.gguf_file and not _has_tokenizer(folder):
        return None
    return AutoTokenizer.from_pretrained(location.path, **location.arguments(trust_remote_code))


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).exists() for name in names)


def skeleton(source: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """MODEL on the meta device: its shapes, from the config alone; no weights, no memory."""
    config = load_config(source, gguf_file, trust_remote_code)
    with _explained(source):
        return meta_model(config, trust_remote_code)


Loaded = tuple[Any, Any]  # a model and its tokenizer


def load_model(settings: ModelSettings, **placement: Any) -> Loaded:
    """(model, tokenizer) as a recipe's model section describes them, or where `placement` says."""
    arguments = settings.model_dump() | placement
    return load(arguments.pop("source"), **arguments)


def with_source(settings: ModelSettings, source: str) -> ModelSettings:
    """The same loading settings for another model; a GGUF file belongs to its own model."""
    return settings.model_copy(update={"source": source, "gguf_file": None})
