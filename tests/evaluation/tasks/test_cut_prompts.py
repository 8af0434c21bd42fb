"""Prompts that lm-eval cuts are counted, and every output says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.evaluation.tasks.conftest import quality, write_rows
from tests.tiny import tiny_model

LENGTH = 32


def _choices(folder: Path, lengths: list[int], answer: str = "abc") -> Path:
    """Questions of so many tokens each, which are bytes; a space stands before the answer."""
    rows = [{"query": "q" * n, "choices": ["a", answer], "gold": 0} for n in lengths]
    return write_rows(folder / "choice.jsonl", rows)


def _writing(folder: Path, lengths: list[int], new_tokens: int = 8) -> Path:
    rows = write_rows(folder / "rows.jsonl", [{"query": "q" * n, "gold": "a"} for n in lengths])
    file = folder / "writing.yaml"
    file.write_text(
        f"task: writing\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: query\ndoc_to_target: gold\n"
        f"generation_kwargs: {{max_gen_toks: {new_tokens}}}\nmetric_list: [{{metric: exact_match}}]"
    )
    return file


def test_questions_are_counted_once_whatever_their_choices(tmp_path: Path) -> None:
    # the last of 33 tokens is predicted, not read: 29 + 4 fit, and 30 + 4 do not
    task = _choices(tmp_path, [10, 29, 30, 60])
    for metric in quality(tiny_model(), task, context_length=LENGTH):
        assert metric.conditions["prompts_cut"] == 2
        assert metric.conditions["samples"] == 4


def test_the_room_for_written_answers_counts(tmp_path: Path) -> None:
    task = _writing(tmp_path, [LENGTH - 8, LENGTH - 7, 100])
    (metric,) = quality(tiny_model(), task, context_length=LENGTH)
    assert metric.conditions["prompts_cut"] == 2


def test_nothing_is_said_where_everything_fits(tmp_path: Path) -> None:
    task = _choices(tmp_path, [10, 29])
    for metric in quality(tiny_model(), task, context_length=LENGTH):
        assert "prompts_cut" not in metric.conditions


def test_a_kept_result_keeps_the_number(tmp_path: Path) -> None:
    task, cache = _choices(tmp_path, [10, 60]), tmp_path / "cache"
    for _ in range(2):
        metric, *_ = quality(tiny_model(), task, context_length=LENGTH, cache=cache)
        assert metric.conditions["prompts_cut"] == 1


def test_without_room_for_an_answer_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"answers of up to 32 tokens leave no room .* of 32 tok"):
        quality(tiny_model(), _writing(tmp_path, [5], LENGTH), context_length=LENGTH)
    with pytest.raises(InputError, match=r"an answer of 41 tokens leave"):
        quality(tiny_model(), _choices(tmp_path, [5], "b" * 40), context_length=LENGTH)


def test_every_output_says_so(dense: Path, tmp_path: Path) -> None:
    task, out = _choices(tmp_path, [10, 60, 61]), tmp_path / "out"
    result = invoke(
        "eval", dense, "--tasks", task, "--perplexity", "", "--no-speed", "--task-cache", "none",
        "--context-length", LENGTH, "--out", out,
    )  # fmt: skip
    sentence = (
        "prompts longer than the context of 32 tokens, with room for the answer, lost their "
        "beginning: 2 of 3 in choice"
    )
    assert f"Note: {sentence}." in result.stdout
    assert "truncat" not in result.output.lower()
    content = json.loads((out / "metrics.json").read_text())
    assert content["notes"] == [sentence]
    assert [m["conditions"].get("prompts_cut") for m in content["metrics"]] == [None] * 3 + [2, 2]
    for name in ("report.md", "report.html"):
        assert sentence in (out / name).read_text()
    again = invoke("report", out, "--json")
    assert json.loads(again.stdout)["notes"] == [sentence]
