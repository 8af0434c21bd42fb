"""The plug-in of vLLM checks the files of a checkpoint without vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.serving.damage import SEEN_IN_FILES
from vllm_lrcompress.files import INDEX, check_folder, stored_tensors
from vllm_lrcompress.records import CheckpointError, read_records


def check(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    check_folder(folder, read_records(config["quantization_config"]))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def sharded(copy: Path) -> Path:
    """The same checkpoint in two files with an index."""
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    (copy / "model.safetensors").unlink()
    weight_map = {name: file for file, part in files.items() for name in part}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return copy


def test_an_intact_checkpoint_passes(checkpoint: Path) -> None:
    check(checkpoint)


def test_headers_are_read_as_safetensors_reads_them(checkpoint: Path) -> None:
    expected = load_file(checkpoint / "model.safetensors")
    stored = stored_tensors(checkpoint)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert {stored[name].dtype for name in stored if name.endswith(".order")} == {"I32"}


@pytest.mark.parametrize("damage", SEEN_IN_FILES, ids=lambda damage: damage.__name__)
def test_damaged_files(damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        check(copy)
    assert SEEN_IN_FILES[damage] in str(error.value)
    assert "get an intact copy" in str(error.value)
    assert "\n" not in str(error.value)


def test_shards(sharded: Path) -> None:
    check(sharded)
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: missing in"):
        check(sharded)


def test_an_index_that_names_a_tensor_of_no_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.lost.weight"] = "a.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"a.safetensors: model.lost.weight missing"):
        check(sharded)


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it has no safetensors files"):
        check(copy)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 40, b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_no_safetensors(content: bytes, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="its header is damaged"):
        check(copy)


def test_without_lrcompress_json(copy: Path) -> None:
    """A plain `save_pretrained` writes none."""
    (copy / "lrcompress.json").unlink()
    check(copy)
