"""The worked examples of docs/extending.md work as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lrcompress.checkpoint.export import registry as exports
from lrcompress.checkpoint.export.registry import ExportFormat
from lrcompress.methods import registry
from lrcompress.methods.targets import TARGETS, Target
from tests.conftest import invoke

BLOCKS = re.findall(r"```python\n(.*?)```", Path("docs/extending.md").read_text("utf-8"), re.DOTALL)


def _module(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of that file as a module of its own; returns the module's name."""
    (code,) = (block for block in BLOCKS if block.startswith(f"# {file}\n"))
    name = f"example_{Path(file).stem}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def _factorize(dense: Path, out: Path, *options: str) -> dict[str, Any]:
    text = out.with_suffix(".txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    common = ("--keep-ratio", "0.6", "--rank-multiple", "2", "--calibration", text)
    size = ("--num-samples", "2", "--seq-len", "32")
    result = invoke("factorize", dense, "--out", out, *common, *size, *options)
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads((out / "lrcompress.json").read_text())
    return record


def test_method(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("lrcompress/methods/shrunk.py", tmp_path, monkeypatch)
    monkeypatch.setitem(registry.METHODS, "svd", f"{module}:ShrunkSVD")
    options = ("--method", "svd", "--method-options", "shrinkage=0.2")
    record = _factorize(dense, tmp_path / "out", *options)
    assert record["recipe"]["factorize"]["method_options"] == {"shrinkage": 0.2}
    assert record["counts"]["selected"]["keep_ratio"] == pytest.approx(0.6, abs=0.02)


def test_policy(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("lrcompress/methods/allocators/tapered.py", tmp_path, monkeypatch)
    monkeypatch.setitem(registry.ALLOCATORS, "uniform", f"{module}:Tapered")
    options = ("--method", "whitened", "--ranks", "uniform", "--ranks-options", "taper=0.3")
    linears = _factorize(dense, tmp_path / "out", *options)["linears"]
    kept = [sum(x["parameters_kept"] for x in linears if x["block"] == block) for block in (0, 1)]
    assert kept[0] > kept[1]


def test_target(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in BLOCKS if block.startswith("# lrcompress/methods/targets.py"))
    (target,) = eval(f"{{{code}}}", {"Target": Target}).values()
    monkeypatch.setitem(TARGETS, "gguf", target)
    linears = _factorize(dense, tmp_path / "out", "--for", "gguf")["linears"]
    widths = {x["in_features"] if x["form"] == "dense" else x["shape"][1]
              for x in linears if x["role"] == "down"}  # fmt: skip
    assert widths <= {64, 88}
    assert 64 in widths


def test_export_format(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("lrcompress/checkpoint/export/weights.py", tmp_path, monkeypatch)
    writer = ExportFormat(f"{module}:export_weights", "one file")
    monkeypatch.setitem(exports.FORMATS, "dense", writer)
    _factorize(dense, tmp_path / "small")
    result = invoke("export", tmp_path / "small", "--to", "dense", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out" / "weights.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118


def test_registry_lines_name_what_the_examples_define() -> None:
    """Each line for a registry names the file of the example before it, and a name in that file."""
    files = {
        file: block for block in BLOCKS for file in re.findall(r"^# (lrcompress/\S+\.py)\n", block)
    }
    lines = re.findall(r'"(lrcompress\.[\w.]+):(\w+)"', "\n".join(BLOCKS))
    assert len(lines) == 3
    for module, name in lines:
        block = files[f"{module.replace('.', '/')}.py"]
        assert re.search(rf"^(?:class|def) {name}\b", block, re.MULTILINE)
