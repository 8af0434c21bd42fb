"""Ways to damage a checkpoint of `random_checkpoint`, and how each has to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = "model.layers.1.mlp"  # gate factored, up and down pivoted
Tensors = dict[str, Tensor]


def _tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def missing_factor(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.pop(f"{BLOCK}.gate_proj.B.weight"))


def missing_guard(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.pop(f"{BLOCK}.down_proj.weight"))


def missing_norm(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def misshapen_coefficients(folder: Path) -> None:
    name = f"{BLOCK}.up_proj.Z.weight"
    _tensors(folder, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))


def repeated_pivot(folder: Path) -> None:
    def repeat(tensors: Tensors) -> None:
        order = tensors[f"{BLOCK}.down_proj.order"]
        order[1] = order[0]

    _tensors(folder, repeat)


def order_of_floats(folder: Path) -> None:
    name = f"{BLOCK}.up_proj.order"
    _tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))


def cut_off_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def forgotten_record(folder: Path) -> None:
    _config(folder, lambda record: record["modules"].pop(f"{BLOCK}.down_proj"))


def wrong_rank(folder: Path) -> None:
    _config(folder, lambda record: record["modules"][f"{BLOCK}.gate_proj"].update(rank=8))


def unknown_form(folder: Path) -> None:
    _config(folder, lambda record: record["modules"][f"{BLOCK}.gate_proj"].update(form="butterfly"))


def newer_version(folder: Path) -> None:
    _config(folder, lambda record: record.update(format_version=2))


def quantized(folder: Path) -> None:
    _config(folder, lambda record: record.update(quant_method="lowrank_torchao"))


def two_widths(folder: Path) -> None:
    """Files and config.json agree, but gate and up give 56 channels and down takes 48."""
    name = "model.layers.0.mlp.down_proj"
    _config(folder, lambda record: record["modules"][name].update(shape=[128, 48]))
    key = f"{name}.weight"
    _tensors(folder, lambda tensors: tensors.update({key: tensors[key][:, :48].clone()}))
    (folder / "lrcompress.json").unlink()


# damage -> what its refusal says
READ_FROM_CONFIG: dict[Callable[[Path], None], str] = {
    unknown_form: f"{BLOCK}.gate_proj: its record in config.json has no known form",
    newer_version: "low-rank format version 2",
}
SEEN_IN_FILES: dict[Callable[[Path], None], str] = {
    missing_factor: f"{BLOCK}.gate_proj: B.weight missing in the checkpoint",
    missing_guard: f"{BLOCK}.down_proj: weight missing in the checkpoint",
    missing_norm: "so a tensor is missing or changed",
    misshapen_coefficients: f"{BLOCK}.up_proj: Z.weight has shape [13, 114] in the checkpoint and "
    "[14, 114] by config.json",
    repeated_pivot: f"{BLOCK}.down_proj: its order does not name each input once",
    order_of_floats: f"{BLOCK}.up_proj: order has type F32",
    cut_off_file: "model.safetensors: it is cut off or has been changed",
    forgotten_record: f"{BLOCK}.down_proj: it is low-rank in the files, and config.json does not "
    "name it",
    wrong_rank: f"{BLOCK}.gate_proj: A.weight has shape [9, 128] in the checkpoint and [8, 128]",
}
SEEN_IN_THE_MODEL: dict[Callable[[Path], None], str] = {
    quantized: "the weights of this checkpoint are quantized (lowrank_torchao)",
    two_widths: "model.layers.0.mlp.down_proj: its 48 channels are not the 56 of "
    "model.layers.0.mlp.gate_proj",
}
