"""Streaming gives the checkpoint that `factorize` in memory gives, block by block, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrcompress.blockfiles import Activations, BlockFiles
from lrcompress.blocks import Blocks
from lrcompress.blockwise import Blockwise
from lrcompress.models import load
from lrcompress.walk import Walk
from tests.conftest import interrupt, invoke
from tests.tiny import byte_tokenizer, logits, saved_model, tiny_model

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


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--method", "auto")),
        ("llama", ("--method", "svd", "--exclude", "*.gate_proj", "--dense-first", "1")),
        ("gpt2", ("--method", "fisher", "--form", "factored")),
        ("gemma2", ("--method", "nystrom", "--dtype", "bfloat16")),
        ("phi3", ("--method", "whitened", "--sequential", "anchored")),
        ("opt", ("--method", "auto", "--refine", "--dtype", "bfloat16")),
        ("falcon", ("--method", "auto", "--refine", "--sequential", "anchored")),
    ],
)
def test_the_same_bit_for_bit(tmp_path: Path, family: str, flags: tuple[str, ...]) -> None:
    dense = saved_model(tmp_path / "dense", family)
    check_same(dense, tmp_path, "--keep-ratio", "0.6", *flags)


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    """Weights in many files on the way in, and from_pretrained on the way out."""
    model = tiny_model(num_hidden_layers=3, tie_word_embeddings=True)
    dense = tmp_path / "dense"
    model.save_pretrained(dense, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(dense)
    assert len([*dense.glob("*.safetensors")]) > 3
    check_same(dense, tmp_path, "--keep-ratio", "0.6", "--method", "whitened")
    plain, streamed = (load(tmp_path / name)[0] for name in ("plain", "streamed"))
    assert len([*(tmp_path / "streamed").glob("*.safetensors")]) == 1 + 3
    assert torch.equal(logits(plain), logits(streamed))
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


STEPS: list[tuple[type, str, int]] = [
    (Activations, "write", 7),
    (Blockwise, "_input_gradient", 3),
    (BlockFiles, "write_choices", 2),
    (BlockFiles, "write", 2),
    (Walk, "finish", 2),
]


@pytest.mark.parametrize(("kind", "method", "at"), STEPS)
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, method: str, at: int
) -> None:
    dense = saved_model(tmp_path / "dense", num_hidden_layers=3)
    flags = ("--keep-ratio", "0.6", "--streaming", "--refine", "--sequential", "anchored")
    with monkeypatch.context() as patch:
        interrupt(patch, kind, method, at)
        result = invoke("factorize", dense, "--out", tmp_path / "out", *TEXT, *GRADIENTS, *flags)
        assert result.exit_code == 130
        assert "goes on from what was finished" in result.output
    assert not (tmp_path / "out").exists()
    calls = interrupt(monkeypatch, Blocks, "run", 0)
    again = factorized(dense, tmp_path / "out", *flags)
    resumed = len(calls)
    undisturbed = factorized(dense, tmp_path / "undisturbed", *flags)
    assert resumed < len(calls) - resumed  # what was finished was not done again
    first, second = weights(again), weights(undisturbed)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert record(again) == record(undisturbed)
