"""Small tasks and their evaluation, for the tests of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import lrcompress
from lrcompress.reporting.metric import Metric
from tests.conftest import interrupt
from tests.tiny import byte_tokenizer

WORDS = ["apple", "bear", "cloud", "door", "eagle", "frost", "glass", "hill"]
ROWS = [
    {"query": f"Number {i} of the list is", "choices": [w, w[::-1], "no"], "gold": i % 3}
    for i, w in enumerate(WORDS)
]
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_yaml(folder: Path, name: str = "mine", text: str = "query") -> Path:
    rows = write_rows(folder / f"{name}-rows.jsonl", ROWS)
    (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, rows=rows, text=text))
    return folder / f"{name}.yaml"


def quality(
    model: Any, *tasks: Path | str, cache: Path | str = "none", **more: Any
) -> list[Metric]:
    settings: dict[str, Any] = {"perplexity": [], "speed": False, "context_length": 128} | more
    names = [str(task) for task in tasks]
    metrics = lrcompress.evaluate(
        model, byte_tokenizer(), tasks=names, task_cache=str(cache), **settings
    )
    return [metric for metric in metrics if "task_version" in metric.conditions]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each forward pass of a llama."""
    return interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)
