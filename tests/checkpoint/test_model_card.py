"""The model card says what the model is and names the programs that run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lrcompress
from lrcompress.checkpoint.record import write_record
from tests.conftest import SMALL, invoke
from tests.tiny import byte_tokenizer, saved_model, tiny_model

VLLM, GGUF, DENSE = "vllm serve FOLDER", "export FOLDER --to gguf", "export FOLDER --to dense"


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def _title(card: str) -> str:
    (title,) = (line for line in card.splitlines() if line.startswith("# "))
    return title


def _factorized(out: Path, source: Path, *options: object) -> Path:
    result = invoke("factorize", source, "--out", out, "--keep-ratio", 0.6, *options, *SMALL)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def mixed(dense: Path, tmp_path: Path) -> Path:
    """A checkpoint with a low-rank and a narrowed block, as its record says; its weights are not
    those."""
    folder = _factorized(tmp_path / "mixed", dense, "--method", "svd")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    modules = config["quantization_config"]["modules"]
    for name in modules:
        if ".layers.0." in name:
            modules[name] = {"form": "narrowed", "shape": modules[name]["shape"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_record(folder, json.loads((folder / "lrcompress.json").read_text("utf-8")))
    return folder


def test_low_rank(dense: Path, tmp_path: Path) -> None:
    card = _card(_factorized(tmp_path / "out", dense, "--method", "svd"))
    assert _title(card) == f"# Low-rank {dense}"
    assert "\n- low-rank\n- lrcompress\n" in card
    assert "import lrcompress" in card
    assert VLLM in card
    assert GGUF not in card
    assert "which may be larger" in card


def test_mixed(mixed: Path, dense: Path) -> None:
    card = _card(mixed)
    assert _title(card) == f"# Narrowed and low-rank {dense}"
    assert "\n- narrowed\n- low-rank\n- lrcompress\n" in card
    assert VLLM in card
    assert GGUF not in card


def test_low_rank_linears_of_a_narrowed_ffn(mixed: Path, dense: Path) -> None:
    record = json.loads((mixed / "lrcompress.json").read_text("utf-8"))
    config = json.loads((mixed / "config.json").read_text("utf-8"))
    config["quantization_config"]["modules"] = {}
    (mixed / "config.json").write_text(json.dumps(config))
    for linear in record["linears"]:
        linear["shape"] = [size - 8 for size in linear["shape"]]
    write_record(mixed, record)
    assert _title(_card(mixed)) == f"# Narrowed and low-rank {dense}"


@pytest.mark.parametrize(
    ("family", "target", "has_gguf"),
    [
        ("llama", "transformers", True),
        ("llama", "gguf", True),
        ("qwen3", "transformers", False),  # its blocks have several widths
        ("qwen3", "gguf", True),
        ("qwen3", "stock", True),
        ("opt", "stock", False),
    ],
)
def test_narrowed(family: str, target: str, has_gguf: bool, tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", family)
    method = ("--method", "nystrom", "--for", target)
    card = _card(_factorized(tmp_path / "out", source, *method))
    assert _title(card) == f"# Narrowed {source}"
    assert "\n- narrowed\n- lrcompress\n" in card
    assert VLLM in card
    assert (GGUF in card) == has_gguf
    assert ("as small as this one" in card) == (target == "stock")


def test_experts_are_served_by_transformers(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "source", "qwen3_moe")
    card = _card(_factorized(tmp_path / "out", source, "--method", "nystrom"))
    assert _title(card).startswith("# Narrowed")
    assert VLLM not in card
    assert GGUF not in card
    assert DENSE in card


def test_dense_exports_say_what_they_were_made_from(dense: Path, tmp_path: Path) -> None:
    small = _factorized(tmp_path / "small", dense, "--method", "nystrom")
    result = invoke("export", small, "--to", "dense", "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    card = _card(tmp_path / "plain")
    assert _title(card) == f"# Narrowed {dense}, in stock layers"
    assert "import lrcompress" not in card
    assert "other programs" not in card


def test_a_model_without_a_record(tmp_path: Path) -> None:
    model = tiny_model()
    lrcompress.factorize(model, byte_tokenizer(), method="svd", keep_ratio=0.5)
    lrcompress.save(model, tmp_path / "out")
    assert _title(_card(tmp_path / "out")) == "# Low-rank causal language model"


@pytest.mark.parametrize("config", ["[]", '{"quantization_config": {"modules": {"a": [1]}}}'])
def test_a_damaged_config_costs_no_card(config: str, factorized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(factorized, folder)
    (folder / "config.json").write_text(config)
    write_record(folder, json.loads((folder / "lrcompress.json").read_text("utf-8")))
    assert "import lrcompress" in _card(folder)
