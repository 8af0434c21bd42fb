"""Tampered recipes, configs, checkpoints and reports: right, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lrcompress.checkpoint import record as checkpoint_record
from lrcompress.checkpoint.record import read_record, write_record
from lrcompress.models import loading
from lrcompress.reporting import report
from lrcompress.reporting.render import json_text
from lrcompress.reporting.report import Report
from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.report import SweepReport
from tests.conftest import invoke
from tests.mutations import damaged, disturbed, explore, tampered
from tests.samples import DETAILS, METRICS, RECORD, points
from tests.tiny import logits
from tests.torture.conftest import Tally, Times

# absurd numbers make numpy and matplotlib warn
pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE: dict[str, Any] = {
    "model": {"source": "here", "dtype": "float32", "device": "cpu", "trust_remote_code": False},
    "calibration": {"data": ["pydoc", "a.txt"], "num_samples": 4, "seq_len": 64, "seed": 3},
    "factorize": {
        "keep_ratio": 0.6, "method": "whitened", "method_options": {"damping": 0.01},
        "ranks": "uniform", "form": "factored", "exclude": ["a.*"], "rank_multiple": 8,
    },
    "refine": {"enabled": True, "epochs": 2, "learning_rate": 0.01},
    "finetune": {"data": ["b.txt"], "max_steps": 10, "learning_rate": 1e-3, "seed": 1},
    "evaluate": {
        "perplexity": ["c.txt"], "tasks": ["arc_easy"], "limit": 3, "data_dir": "copies",
        "prompts": ["Once"], "repeats": 3, "baseline": ["d"],
    },
    "sweep": {"keep_ratios": [0.8, 0.6], "variants": {"small": {"rank_multiple": 4}}},
}  # fmt: skip
LADDER: dict[str, Any] = {
    "pretrain": {"data": ["a.txt"], "vocab_size": 300, "learning_rate": 1e-3},
    "scaling": {
        "sizes": {"llama-0.3m": {"seeds": 1}, "llama-0.9m": {}, "llama-2.5m": {}},
        "variants": {"low": {"keep_ratio": 0.5}},
        "tokens_per_parameter": 1.0, "equal_flops": {"low": "low"}, "resamples": 60,
    },
}  # fmt: skip


def check_refusal(error: Exception) -> None:
    """A refusal is an error of lrcompress with a text, and without a traceback."""
    assert isinstance(error, InputError | MachineError)
    assert str(error)
    assert "Traceback" not in str(error)


def test_recipes(tmp_path: Path, times: Times, tally: Tally) -> None:
    file, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"

    def check(text: str) -> None:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        result = invoke("check", file)
        assert result.exit_code in (0, 2), result.output
        if result.exit_code == 0:
            again.write_text(result.stdout, "utf-8")
            assert invoke("check", again).stdout == result.stdout
        else:
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1
            assert len(result.stderr) < 3000
        assert {path.name for path in Path().glob("BROKEN*")} == set()

    dumped = [yaml.safe_dump(recipe, sort_keys=False) for recipe in (RECIPE, LADDER)]
    trees = st.one_of(*map(tampered, (RECIPE, LADDER))).map(_dumped)
    texts = st.one_of(trees, st.one_of(*map(disturbed, dumped)))
    tally("recipes", explore(texts, check, times(1000, 40)))


def _dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _logits_by_lrcompress(folder: Path) -> torch.Tensor | None:
    """None where lrcompress refuses to load the model."""
    try:
        return logits(loading.load(folder, dtype="float32")[0])
    except (InputError, MachineError) as error:
        check_refusal(error)
        return None


def _logits_by_transformers(folder: Path) -> torch.Tensor | None:
    """None where transformers refuses to load the model, by an error of any type."""
    try:
        return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    except Exception:
        return None


def test_configs_of_models(dense: Path, tmp_path: Path, times: Times, tally: Tally) -> None:
    """A changed config gives another model or a refusal, but no traceback."""
    folder = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def check(changed: Any) -> None:
        (folder / "config.json").write_text(json.dumps(changed))
        result = invoke("inspect", folder)
        assert result.exit_code in (0, 2), result.output
        assert result.exit_code == 0 or result.stderr.count("\n") == 1
        output = _logits_by_lrcompress(folder)
        assert output is None or output.ndim == 3

    tally("model configs", explore(tampered(config), check, times(250, 15)))


def test_configs_of_checkpoints(
    factorized: Path, tmp_path: Path, times: Times, tally: Tally
) -> None:
    folder = shutil.copytree(factorized, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    expected = logits(loading.load(factorized)[0])

    def check(record: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": record}))
        for output in (_logits_by_lrcompress(folder), _logits_by_transformers(folder)):
            assert output is None or torch.equal(output, expected)

    records = tampered(config["quantization_config"])
    tally("checkpoint configs", explore(records, check, times(250, 15)))


def test_headers_and_lengths_of_weights(
    factorized: Path, tmp_path: Path, times: Times, tally: Tally
) -> None:
    folder = shutil.copytree(factorized, tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    expected = logits(loading.load(factorized)[0])

    def check(changed: Any) -> None:
        if not isinstance(changed, bytes):
            head = json.dumps(changed).encode()
            changed = len(head).to_bytes(8, "little") + head + data
        (folder / "model.safetensors").write_bytes(changed)
        for output in (_logits_by_lrcompress(folder), _logits_by_transformers(folder)):
            assert output is None or torch.equal(output, expected)

    changes = st.one_of(tampered(header), damaged(content, 8 + size))
    tally("weight files", explore(changes, check, times(300, 15)))


def test_records_of_checkpoints(tmp_path: Path, times: Times, tally: Tally) -> None:
    """The fields of lrcompress.json that cards, reports and checks of contamination read."""
    folder = tmp_path / "model"
    folder.mkdir()
    sketch = {"below": 2**32, "hashes": "AAAAAA=="}
    text = {"data": "a.txt", "tokens": 64, "sha256": "2" * 64, "sketch": sketch}
    original = RECORD | {"source": "here", "calibration": text, "before": {"calibration": text}}

    def check(changed: Any) -> None:
        (folder / checkpoint_record.RECORD).write_text(json.dumps(changed))
        try:
            record = read_record(folder)
            assert record is not None
            write_record(folder, record)
            _render(Report("title", METRICS, DETAILS, record))
        except InputError as error:
            check_refusal(error)

    tally("records", explore(tampered(original), check, times(100, 8)))


def _render(content: Report) -> None:
    for to_text in report.FORMATS.values():
        to_text(content)


@pytest.mark.parametrize("kind", ["report", "sweep"])
def test_reports(kind: str, tmp_path: Path, times: Times, tally: Tally) -> None:
    """metrics.json, and sweep.json with its points, read and rendered again."""
    if kind == "report":
        report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
        file = tmp_path / "metrics.json"
    else:
        sweep_report.write(tmp_path, SweepReport("here", tuple(points())))
        file = tmp_path / "sweep.json"
        (tmp_path / "points").mkdir()
        for point in points():
            name = f"{point.variant}-{point.keep_ratio:g}" if point.variant != "dense" else "dense"
            content = {"point": json.loads(json_text(asdict(point)))}
            (tmp_path / "points" / f"{name}.json").write_text(json.dumps(content))
    tree = json.loads(file.read_text())

    def check(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        result = invoke("report", tmp_path)
        assert result.exit_code in (0, 2), result.output
        assert result.exit_code == 0 or result.stderr.count("\n") == 1

    tally("reports", explore(tampered(tree), check, times(60, 8)))
