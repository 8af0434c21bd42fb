"""Groups have lm-eval's own values, items to be compared by, and a place before their parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lrcompress.reporting.metric import Metric
from tests.conftest import invoke
from tests.evaluation.tasks.conftest import CHOICES, ROWS, quality, write_rows
from tests.tiny import byte_tokenizer, tiny_model

# task -> number of its questions
SIZES = {"left_a": 8, "left_b": 3, "right_a": 5, "alone": 4}
GROUPS = """
group: whole
task:
  - group: left
    task: [left_a, left_b]
    aggregate_metric_list: [{metric: acc, weight_by_size: true}]
  - group: right
    task: [right_a]
aggregate_metric_list: [{metric: acc, weight_by_size: BY_SIZE}]
metadata: {version: 2.0}
"""


def write_group(folder: Path, by_size: bool) -> Path:
    """whole > left > (left_a, left_b); whole > right > right_a, where right has no value."""
    for name, size in SIZES.items():
        rows = write_rows(folder / f"{name}-rows.jsonl", ROWS[:size])
        (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, rows=rows, text="query"))
    file = folder / "whole.yaml"
    file.write_text(GROUPS.replace("BY_SIZE", str(by_size).lower()))
    return file


def measured(folder: Path, by_size: bool) -> list[Metric]:
    group = write_group(folder, by_size)
    return quality(tiny_model(), folder / "alone.yaml", group, num_fewshot=0)


@pytest.mark.parametrize("by_size", [True, False])
def test_values_are_those_of_lm_eval(by_size: bool, tmp_path: Path) -> None:
    metrics = {metric.name: metric for metric in measured(tmp_path, by_size)}
    lm = HFLM(tiny_model(), tokenizer=byte_tokenizer(), max_length=128, batch_size=1)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs: dict[str, Any] = simple_evaluate(lm, tasks=["whole"], task_manager=manager)["groups"]
    for name in ("whole", "whole::left"):
        metric, values = metrics[f"{name} acc"], theirs[name]
        assert metric.value == values["acc,none"]
        assert metric.high == metric.value + values["acc_stderr,none"]
    scores = {name: metrics[f"{name} acc"].value for name in SIZES}
    sizes = {name: size if by_size else 1 for name, size in SIZES.items() if name != "alone"}
    mean = sum(scores[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert metrics["whole acc"].value == pytest.approx(mean)


def test_a_group_is_before_its_parts_in_the_order_of_the_request(tmp_path: Path) -> None:
    names = [m.name for m in measured(tmp_path, True) if not m.name.endswith("acc_norm")]
    assert names == [
        "alone acc", "whole acc", "whole::left acc", "left_a acc", "left_b acc", "right_a acc"
    ]  # fmt: skip


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_has_the_items_of_its_tasks_and_the_names_of_its_parts(
    by_size: bool, tmp_path: Path
) -> None:
    metrics = {metric.name: metric for metric in measured(tmp_path, by_size)}
    whole, left = metrics["whole acc"], metrics["whole::left acc"]
    assert whole.parts == ["whole::left acc", "right_a acc"]
    assert left.parts == ["left_a acc", "left_b acc"]
    assert metrics["left_a acc"].parts == []
    weights = [weight for _, weight in whole.samples]
    one = (1.0, 1.0, 1.0) if by_size else (1 / 8, 1 / 3, 1 / 5)
    assert weights == [one[0]] * 8 + [one[1]] * 3 + [one[2]] * 5
    assert sum(score for score, _ in whole.samples) / sum(weights) == pytest.approx(whole.value)
    assert [weight for _, weight in left.samples] == [1.0] * 11
    assert "samples" not in whole.conditions


def test_other_questions_in_a_part_are_another_measurement(tmp_path: Path) -> None:
    first = {metric.name: metric for metric in measured(tmp_path, True)}
    write_rows(tmp_path / "right_a-rows.jsonl", [{**row, "gold": 0} for row in ROWS[:5]])
    group = [str(tmp_path / name) for name in ("alone.yaml", "whole.yaml")]
    second = {metric.name: metric for metric in quality(tiny_model(), *group, num_fewshot=0)}
    asked = {
        name: first[f"{name} acc"].conditions["questions"]
        == second[f"{name} acc"].conditions["questions"]
        for name in ("whole", "whole::left", "right_a")
    }
    assert asked == {"whole": False, "whole::left": True, "right_a": False}


def test_a_task_without_the_metric_is_no_part(tmp_path: Path) -> None:
    group = write_group(tmp_path, True)
    task = tmp_path / "left_b.yaml"
    task.write_text(task.read_text().replace("{metric: acc}, ", ""))
    metrics = {m.name: m for m in quality(tiny_model(), group, num_fewshot=0)}
    assert metrics["whole acc"].parts == ["whole::left acc", "right_a acc"]
    assert metrics["whole::left acc"].parts == ["left_a acc"]
    assert len(metrics["whole::left acc"].samples) == 8


def test_a_loss_can_be_asked_of_the_group(dense: Path, factorized: Path, tmp_path: Path) -> None:
    command = [
        "eval", factorized, "--baseline", dense, "--perplexity", "", "--no-speed", "--out",
        tmp_path / "report", "--task-cache", "none", "--context-length", 128, "--tasks",
        write_group(tmp_path, True),
    ]  # fmt: skip
    result = invoke(*command, "--max-loss", "whole=200%")
    assert result.exit_code == 0, result.output
    assert (
        "PASS: it is shown that factorized lost at most 200 % in whole, against dense."
        in result.output
    )
    assert result.output.index("\nwhole acc") < result.output.index("\nwhole::left acc")
    content = json.loads((tmp_path / "report" / "metrics.json").read_text())
    (whole,) = (c for c in content["comparisons"] if c["metric"] == "whole acc")
    assert whole["samples"] == 16
    (metric, _) = (m for m in content["metrics"] if m["name"] == "whole acc")
    assert metric["parts"] == ["whole::left acc", "right_a acc"]
    again = invoke("report", tmp_path / "report", "--max-loss", "whole=1%")
    assert again.exit_code == 3
    assert "whole acc: factorized may have lost" in again.output
    assert "left_a acc: factorized may have lost" not in again.output
    unknown = invoke("report", tmp_path / "report", "--max-loss", "part=1%")
    assert unknown.exit_code == 2
    assert "max_loss names 'part'" in unknown.stderr
