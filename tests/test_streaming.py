"""Streaming gives the checkpoint that `factorize` in memory gives, block by block, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import invoke
from tests.tiny import saved_model

TEXT = ("--calibration", "pydoc", "--num-samples", "4", "--seq-len", "64")
GRADIENTS = ("--gradient-samples", "2")
# what differs between two runs of the same settings
OWN = ("seconds", "recipe", "saved")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lrcompress.json").read_text())
    for block in found["refined"]:
        block.pop("seconds")
    return {key: value for key, value in found.items() if key not in OWN}


def factorized(dense: Path, out: Path, *flags: str) -> Path:
    result = invoke("factorize", dense, "--out", out, *TEXT, *GRADIENTS, *flags)
    assert result.exit_code == 0, result.output
    return out


def check_same(dense: Path, folder: Path, *flags: str) -> None:
    plain = factorized(dense, folder / "plain", *flags)
    streamed = factorized(dense, folder / "streamed", "--streaming", *flags)
    first, second = weights(plain), weights(streamed)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert record(plain) == record(streamed)
    config, other = ((f / "config.json").read_text() for f in (plain, streamed))
    assert config == other
    assert not [*folder.glob(".*")]


@pytest.mark.parametrize("method", ["svd", "whitened", "nystrom", "auto"])
def test_the_same_bit_for_bit(tmp_path: Path, method: str) -> None:
    dense = saved_model(tmp_path / "dense", num_hidden_layers=3)
    check_same(dense, tmp_path, "--keep-ratio", "0.6", "--method", method)
