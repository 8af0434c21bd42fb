"""Turns the MODEL argument into a transformers model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from lrcompress.config import ModelSettings
from lrcompress.models.architecture import model_class
from lrcompress.models.gguf_files import check_gguf, parsed_once
from lrcompress.models.preflight import ADAPTER_FILE, check_folder, meta_model
from lrcompress.models.safetensors_headers import stored_tensors, weight_files
from lrcompress.models.stored_weights import check_tensors
from lrcompress.runtime.errors import InputError, MachineError, machine_fault_reason
from lrcompress.runtime.packages import package_folder
from lrcompress.runtime.paths import is_inside, user_path
from lrcompress.runtime.safe_parsing import read_object

Loaded = tuple[Any, Any]  # a model and its tokenizer
PACKAGE_PREFIX = "package:"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# the error of libraries in Rust; it is a BaseException, but not an Exception
RUST_PANIC = "PanicException"


@dataclass(frozen=True)
class Location:
    """Where from_pretrained finds a model: a folder or hub id, and the GGUF file in it, if any."""

    path: str
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """The folder, hub id or GGUF file, for messages."""
        return str(Path(self.path, self.gguf_file)) if self.gguf_file else self.path

    def arguments(self, trust_remote_code: bool) -> dict[str, Any]:
        """Keyword arguments for from_pretrained."""
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if self.gguf_file:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def locate(source: str, gguf_file: str | None = None) -> Location:
    """Finds MODEL: a folder, a .gguf file, a hub id, or package:NAME/FILE.

    The last is a file of an installed Python package. Raises InputError where a local path does not
    exist or is not a model.
    """
    path = _package_file(source) if source.startswith(PACKAGE_PREFIX) else user_path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model {source!r} is a file: give its folder, or a .gguf file")
        return Location(str(path.parent), path.name)
    if path.is_dir():
        return _local_folder(path, source, gguf_file)
    if source.startswith((PACKAGE_PREFIX, "/", ".", "~")) or source.endswith(".gguf"):
        raise InputError(
            f"model {source!r} does not exist: give a folder, a .gguf file or a hub id"
        )
    return Location(source, gguf_file)


def _package_file(source: str) -> Path:
    name, _, file = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not is_inside(file):
        raise InputError(f"model {source!r} leads out of its package: name a file inside")
    folder = package_folder(name)
    if folder is None:
        raise InputError(f"model {source!r}: no Python package {name!r} is installed here")
    return folder / file


def _local_folder(path: Path, source: str, gguf_file: str | None) -> Location:
    if gguf_file is not None:
        if not (is_inside(gguf_file) and (path / gguf_file).is_file()):
            raise InputError(f"model folder {source!r} has no GGUF file {gguf_file!r}")
    elif not (path / "config.json").is_file():
        if (path / ADAPTER_FILE).is_file():
            raise InputError(_adapter_alone(path, source))
        raise InputError(
            f"model folder {source!r} has no config.json: give a Hugging Face model folder, or "
            "name a GGUF file with --gguf-file"
        )
    return Location(str(path), gguf_file)


def _adapter_alone(path: Path, source: str) -> str:
    try:
        base = read_object(path / ADAPTER_FILE).get("base_model_name_or_path")
    except ValueError:
        base = None
    return (
        f"model folder {source!r} holds an adapter of peft for {base or 'a model'} and no model: "
        "merge both with peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
        ".merge_and_unload(), and give the folder to which save_pretrained writes the result"
    )


@contextmanager
def _load_errors_explained(source: str) -> Iterator[None]:
    """Turns every error of loading a model into one InputError, or MachineError."""
    try:
        yield
    except (InputError, MachineError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # transformers, tokenizers, safetensors, ... raise their own
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        if fault := machine_fault_reason(error):
            raise MachineError(f"model {source!r} cannot be loaded: {fault}") from error
        reason = " ".join(str(error).split())
        if "custom code" in reason:
            raise InputError(
                f"model {source!r} needs its own code to load, which is not run by default: read "
                "it, and if you trust it give --trust-remote-code (trust_remote_code in Python)"
            ) from error
        reason = reason[:300] or type(error).__name__
        local = user_path(source).exists() or source.startswith(PACKAGE_PREFIX)
        problem = "cannot be loaded"
        if not local:
            problem = "is not a folder here, and cannot be loaded from the hub"
        raise InputError(f"model {source!r} {problem}: {reason}") from error


def load_config(source: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of MODEL, without its weights."""
    from transformers import AutoConfig

    location = locate(source, gguf_file)
    with _load_errors_explained(location.name if gguf_file else source):
        _check_gguf(location)
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

    A GGUF file is de-quantized into an ordinary model. `device` is a torch device or `auto`: GPUs
    where there are any (accelerate spreads the blocks of a model over all of them), else the CPU.
    `placement` holds arguments of from_pretrained that replace `device`. The tokenizer is None
    where the folder has none. Only safetensors and GGUF weights are read. Raises InputError where
    the model is missing, unsupported, incomplete or damaged.
    """
    source, dtype = str(source), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    location = locate(source, gguf_file)
    with _load_errors_explained(location.name if gguf_file else source), parsed_once():
        model = _model_from_pretrained(
            location, dtype, placement or _placement(device), trust_remote_code
        )
        return model, _load_tokenizer(location, trust_remote_code)


def _model_from_pretrained(
    location: Location, dtype: str, placement: Mapping[str, Any], trust_remote_code: bool
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    arguments = location.arguments(trust_remote_code)
    loaded_class: Any = AutoModelForCausalLM
    if location.gguf_file:
        _check_gguf(location)
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        check_folder(location.path, trust_remote_code)
        arguments["config"] = AutoConfig.from_pretrained(location.path, **arguments)
        arguments["use_safetensors"] = True
        loaded_class = model_class(arguments["config"], trust_remote_code)
    model, report = loaded_class.from_pretrained(
        location.path,
        dtype=torch_dtype(dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the error below names them
        **arguments,
        **placement,
    )
    description = "metadata" if location.gguf_file else CONFIG_NAME
    check_tensors(location.name, model, report, description)
    return model


def _check_gguf(location: Location) -> None:
    """Checks the GGUF file of `location`, if it has one; from the hub it is downloaded first."""
    from transformers.utils import cached_file

    if location.gguf_file:
        check_gguf(Path(str(cached_file(location.path, location.gguf_file))))


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
    """The tokenizer of MODEL or of a folder with only a tokenizer; None where there is none."""
    is_folder = gguf_file is None and user_path(source).is_dir()
    location = Location(str(user_path(source))) if is_folder else locate(source, gguf_file)
    with _load_errors_explained(source):
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
    """MODEL on the meta device, from its config alone: shapes without weights or memory."""
    config = load_config(source, gguf_file, trust_remote_code)
    with _load_errors_explained(source):
        return meta_model(config, trust_remote_code)


def shapes_of(settings: ModelSettings) -> Any | None:
    """MODEL on the meta device, in the dtype in which it will be loaded.

    None where it runs its own code, and where it cannot be loaded, for reasons that `load` gives.
    """
    if settings.trust_remote_code:
        return None
    try:
        location = locate(settings.source, settings.gguf_file)
        with _load_errors_explained(location.name):
            if not location.gguf_file:
                check_folder(location.path, False)
            model = skeleton(settings.source, settings.gguf_file)
    except (InputError, MachineError):
        return None
    if settings.dtype != "auto":
        return model.to(torch_dtype(settings.dtype))
    if model.config.dtype is None and not location.gguf_file and Path(location.path).is_dir():
        return model.to(_stored_dtype(Path(location.path)))
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that `auto` takes where a config names none: that of the first float weight."""
    from transformers.modeling_utils import str_to_torch_dtype

    stored = stored_tensors(weight_files(folder)).values()
    name = next((tensor.dtype for tensor in stored if tensor.is_float), "F32")
    dtype: torch.dtype = str_to_torch_dtype[name]
    return dtype


def load_model(settings: ModelSettings, **overrides: Any) -> Loaded:
    """Loads (model, tokenizer) by the model section of a recipe.

    `overrides` are arguments of `load` that replace settings, such as `device` or `placement`.
    """
    arguments = settings.model_dump() | overrides
    return load(arguments.pop("source"), **arguments)


def with_source(settings: ModelSettings, source: str) -> ModelSettings:
    """The same settings for another model; `gguf_file`, which belongs to the old one, is reset."""
    return settings.model_copy(update={"source": source, "gguf_file": None})
