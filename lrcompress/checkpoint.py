"""The on-disk form: an ordinary Hugging Face folder with its provenance beside the weights."""

from __future__ import annotations

import errno
import inspect
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import SafetensorError, safe_open

from lrcompress import lowrank
from lrcompress.protocols import InputError, MachineError
from lrcompress.quantizer import record_layout

RECORD = "lrcompress.json"
# parts that only a low-rank layer has
OWN = (".A.weight", ".Z.weight")
STANDALONE_MODULE = "modeling_lowrank"


def check_free(out: Path) -> None:
    """Raises InputError if something stands at `out`, or its parent is no folder to write to."""
    if out.exists() or out.is_symlink():
        raise InputError(f"output {str(out)!r} exists: choose another folder, or remove it")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r}: {str(parent)!r} is not a folder to write to")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well.

    Whatever goes wrong, `out` is either complete or does not exist, and the hidden folder is
    gone. Raises MachineError where the disk is full or the folder cannot be written.
    """
    check_free(out)
    partial = out.absolute().parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise _failed(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _failed(out: Path, error: Exception) -> MachineError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else " ".join(str(error).split())
    return MachineError(f"could not write {str(out)!r}: {reason}; nothing was left there")


def save(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes model, tokenizer, provenance and model card to the new folder `out`.

    `record` is completed with versions and the counts of what was saved, and returned. Raises
    InputError if `out` exists, MachineError if it cannot be written.
    """
    record_layout(model)
    with writing(out) as folder:
        _write_weights(model, tokenizer, folder)
        complete = dict(record) | {"versions": versions(), "saved": saved_tensors(folder)}
        write_record(folder, complete)
    return complete


def _write_weights(model: Any, tokenizer: Any, folder: Path) -> None:
    config = model.config.__dict__
    config.pop("auto_map", None)  # it would point at code that is not in this folder
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def versions() -> dict[str, str]:
    """Of the software that decides results; Python's, because `pydoc` texts are its own."""
    packages = ("lrcompress", "lm-eval", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def saved_tensors(folder: Path) -> dict[str, int]:
    """Numbers and bytes in the safetensors files of `folder`.

    The numbers leave out format guards and the index vectors of the pivoted form.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:  # type: ignore[no-untyped-call,unused-ignore]
            shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    beside = {key.removesuffix(end) for key in shapes for end in OWN if key.endswith(end)}
    passive = {f"{name}.{buffer}" for name in beside for buffer in ("weight", "order")}
    numbers = sum(_product(shape) for key, shape in shapes.items() if key not in passive)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"parameters": numbers, "bytes": size}


def _product(shape: list[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def read_record(folder: Path) -> dict[str, Any] | None:
    """lrcompress.json of a checkpoint; None where the folder has none."""
    file = folder / RECORD
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes lrcompress.json and the model card that tells the same, each in one rename."""
    _replace(folder / RECORD, json.dumps(record, indent=2) + "\n")
    _replace(folder / "README.md", model_card(record))


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)


def model_card(record: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("lrcompress", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    return environment.get_template("card.md.jinja").render(record=record)


def export_dense(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes `model` with every low-rank layer merged back into its stock layer.

    Anything that loads the original architecture loads the result, at the original size.
    """
    lowrank.merge_dense(model)
    save(model, tokenizer, out, dict(record) | {"export": "dense"})


def export_standalone(model: Any, tokenizer: Any, out: Path, record: Mapping[str, Any]) -> None:
    """Writes a folder that loads with trust_remote_code=True where lrcompress is not installed.

    The layers' own source goes with the weights, followed by subclasses of the stock config
    and model that rebuild the low-rank layers from the config.
    """
    modules = lowrank.layout(model)
    with writing(out) as folder:
        _write_weights(model, tokenizer, folder)
        (folder / f"{STANDALONE_MODULE}.py").write_text(_standalone_source(model), "utf-8")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        config |= {"low_rank_modules": modules, "auto_map": _auto_map(model)}
        config["architectures"] = [f"LowRank{type(model).__name__}"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        complete = dict(record) | {
            "export": "standalone",
            "versions": versions(),
            "saved": saved_tensors(folder),
        }
        write_record(folder, complete)


def _auto_map(model: Any) -> dict[str, str]:
    return {
        "AutoConfig": f"{STANDALONE_MODULE}.LowRank{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{STANDALONE_MODULE}.LowRank{type(model).__name__}",
    }


def _standalone_source(model: Any) -> str:
    config, name = type(model.config).__name__, type(model).__name__
    return inspect.getsource(lowrank) + (
        f"\n\nfrom transformers import {config}, {name}  # noqa: E402\n\n\n"
        f"class LowRank{config}({config}):\n"
        '    """The stock config; `low_rank_modules` records the low-rank layers."""\n\n\n'
        f"class LowRank{name}({name}):\n"
        '    """The stock model with its low-rank layers in place."""\n\n'
        f"    config_class = LowRank{config}\n\n"
        f"    def __init__(self, config: LowRank{config}) -> None:\n"
        "        super().__init__(config)\n"
        "        rebuild(self, config.low_rank_modules)\n"
    )
