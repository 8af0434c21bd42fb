"""benchmarks/gpu.sh: its time limits, its results in one JSON, and the tables made of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.sh"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timing(name: str, median: float, **more: Any) -> dict[str, Any]:
    setting = {"pass": "decode", "batch_size": 8}
    return {"setting": setting, "name": name, "median": median, "peak": None} | more


SPEEDUP = {"ratio": 2.5, "low": 2.25, "high": 2.75, "ideal": 3.125}
BENCH = {
    "title": "/somewhere/FFN",
    "timings": [
        timing("dense", 0.005),
        timing("pivoted 0.32", 0.002, speedup=SPEEDUP, peak=3 * 2**20),
    ],
}
GRAPHS = [
    {"batch_size": 8, "path": "CUDA graph", "name": "dense", "seconds": [0.004, 0.006, 0.005]},
    {"batch_size": 8, "path": "CUDA graph", "name": "pivoted", "seconds": [0.002, 0.002, 0.002]},
]
SCALE = {
    "8B, auto": {
        "shape": {"blocks": 1},
        "gpu_memory": 5 * 2**29,
        "stages": {"second_moments": {"seconds": 1.25}, "pivots": {"seconds": 2.5}},
    }
}
QUANTIZED = {"weights": "int4", "bytes_before": 10**9, "bytes": 3 * 10**8}


def recorded(gpu: ModuleType, folder: Path, *words: str) -> dict[str, Any]:
    arguments = gpu.parser().parse_args(["record", str(folder), *words])
    arguments.run(arguments)
    content: dict[str, Any] = json.loads((folder / "gpu.json").read_text("utf-8"))
    return content


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def test_tables_have_the_results_of_every_part_and_the_errors(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"device": "NVIDIA H200", "torch": "2.13.0", "lrcompress": "0.1.0"}
    gpu.write(tmp_path, {"machine": versions, "parts": {}})
    write(tmp_path / "ffn", {"paper/bench.json": BENCH})
    write(tmp_path / "graphs", {"graphs.json": GRAPHS})
    write(tmp_path / "block_8b", {"scale.json": SCALE})
    write(tmp_path / "int4", {"pivoted/lrcompress.json": {"quantized": QUANTIZED}})
    (tmp_path / "log").write_text("Traceback\nRuntimeError: no kernel\n\n")
    statuses = {"ffn": "0", "graphs": "0", "block_8b": "124", "int4": "1"}
    for part, status in statuses.items():
        numbers = ("--status", status, "--seconds", "12", "--limit", "200")
        places = ("--folder", str(tmp_path / part), "--log", str(tmp_path / "log"))
        content = recorded(gpu, tmp_path, part, *numbers, *places)
    assert list(content["parts"]) == list(statuses)
    assert content["parts"]["ffn"]["error"] is None
    assert content["parts"]["ffn"]["results"] == {"paper/bench.json": BENCH}
    assert content["parts"]["int4"]["error"] == "RuntimeError: no kernel"
    text = gpu.report(content)
    expected = [
        "## NVIDIA H200",
        "torch 2.13.0, lrcompress 0.1.0.",
        "### ffn\n\n12 s\n\nFFN\n",
        "| decode, batch size 8 | dense | 5 |  |  |  |",
        "| decode, batch size 8 | pivoted 0.32 | 2 | 2.50 (2.25–2.75) | 3.12 | 3 |",
        "| 8 | CUDA graph | dense | 5 |  |",
        "| 8 | CUDA graph | pivoted | 2 | 2.50 |",
        "**Failed**: not finished in 200 s",  # what it had finished is shown
        "8B, auto, 1 block, at most 2.5 GiB of the GPU",
        "| second moments | 1.2 |",
        "| all | 3.8 |",
        "**Failed**: RuntimeError: no kernel",
        "pivoted: int4, 1,000.0 MB before, 300.0 MB after",
    ]
    positions = [text.find(line) for line in expected]
    assert -1 not in positions, expected[positions.index(-1)]
    assert sorted(positions) == positions
    assert "finished" in capsys.readouterr().out


def test_all_parts_together_take_at_most_25_minutes() -> None:
    script = SCRIPT.read_text("utf-8")
    parts = re.search(r"set -- (.*)", script)
    assert parts is not None
    limits: dict[str, str] = dict(re.findall(r"(\w+|\*)\) echo (\d+)", script))
    total = sum(int(limits.get(part) or limits["*"]) for part in str(parts[1]).split())
    assert total <= 25 * 60 - 30


def test_a_part_that_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A python that fails wherever lrcompress is asked; gpu.py itself runs."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1" in -m) echo "no lrcompress" >&2; exit 3 ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"TINY": "1", "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = ["sh", str(SCRIPT), str(tmp_path / "out"), "ffn", "nonsense"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    content = json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8"))
    assert content["machine"]["device"] == "cpu"
    errors = {name: part["error"] for name, part in content["parts"].items()}
    assert errors == {"ffn": "no lrcompress", "nonsense": "no part is called nonsense"}
    assert "**Failed**: no lrcompress" in (tmp_path / "out" / "gpu.md").read_text("utf-8")
