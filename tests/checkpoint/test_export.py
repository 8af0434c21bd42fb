"""What every entry of FORMATS that is a folder keeps to: new, and written whole or not at all."""

from __future__ import annotations

import math
import pkgutil
from pathlib import Path

import pytest

import lrcompress
from lrcompress.checkpoint.export.registry import FORMATS
from tests.conftest import invoke, refusal
from tests.tiny import broken_copy

each_format = pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if not f.suffix])


@each_format
def test_it_writes_a_folder(name: str, factorized: Path, tmp_path: Path) -> None:
    result = invoke("export", factorized, "--to", name, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert any(path.is_file() for path in (tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@each_format
def test_it_leaves_an_existing_folder_alone(name: str, factorized: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = invoke("export", factorized, "--to", name, "--out", tmp_path)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@each_format
def test_a_failure_leaves_nothing(
    name: str, factorized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lrcompress.load(factorized)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    writer = pkgutil.resolve_name(FORMATS[name].writer)
    with pytest.raises(lrcompress.MachineError, match="the disk is full"):
        writer(model, tokenizer, tmp_path / "out", {})
    assert not any(tmp_path.iterdir())


@each_format
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_that_is_not_finite_is_named(
    name: str, value: float, factorized: Path, tmp_path: Path
) -> None:
    weight = "model.layers.1.self_attn.q_proj.weight"
    broken = broken_copy(factorized, tmp_path / "broken", weight, value)
    sentence = refusal("export", broken, "--to", name, "--out", tmp_path / "out")
    assert f"{weight} of the factorized model is not finite" in sentence
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_one_sentence(factorized: Path, tmp_path: Path) -> None:
    result = invoke("export", factorized, "--to", "onnx", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "dense" in result.stderr
    assert "standalone" in result.stderr
    assert not any(tmp_path.iterdir())
