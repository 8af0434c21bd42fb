"""lm-eval tasks on a model: lm-eval's own numbers, whatever the batch size and seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.evaluation.tasks.runner import TaskOptions, run_tasks
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke
from tests.evaluation.tasks.conftest import ROWS, WORDS, quality, write_rows, write_yaml
from tests.tiny import byte_tokenizer, tiny_model


def test_batches_leave_nothing_out_and_change_nothing(tmp_path: Path) -> None:
    """Neither eight questions nor three texts are a multiple of the batch."""
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"{w} and " * 40} for w in WORDS[:3]])
    tasks, model = (write_yaml(tmp_path), texts), tiny_model()
    single, batched = (quality(model, *tasks, batch_size=size) for size in (1, 5))
    assert [len(metric.samples) for metric in single if metric.name.startswith("mine")] == [8, 8]
    for metric, other in zip(single, batched, strict=True):
        assert (metric.name, len(metric.samples)) == (other.name, len(other.samples))
        assert other.value == pytest.approx(metric.value, rel=1e-5)


@pytest.mark.parametrize("seed", [None, 7])
def test_numbers_are_those_of_lm_evals_command_line(
    dense: Path, tmp_path: Path, seed: int | None
) -> None:
    word = tmp_path / "word.yaml"  # its standard error is a bootstrap
    rows = write_rows(tmp_path / "word-rows.jsonl", ROWS)
    word.write_text(
        f"task: word\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: query\n"
        "doc_to_target: '{{choices[0]}}'\nmetric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    roll = tmp_path / "roll.yaml"
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"{w} and " * 40} for w in WORDS[:3]])
    roll.write_text(
        f"task: roll\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {texts}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    tasks = [write_yaml(tmp_path), word, roll]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
         f"pretrained={dense},max_length=128", "--tasks", *map(str, tasks), "--device", "cpu",
         "--num_fewshot", "2", "--output_path", str(tmp_path / "theirs"), "--log_samples",
         *([] if seed is None else ["--seed", str(seed)])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())
    out = tmp_path / "ours"
    ours = invoke(
        "eval", dense, "--perplexity", "", "--no-speed", "--context-length", "128", "--out", out,
        "--num-fewshot", "2", "--tasks", ",".join(map(str, tasks)),
        *([] if seed is None else ["--seed", seed]),
    )  # fmt: skip
    assert ours.exit_code == 0, ours.output
    metrics = [
        metric
        for metric in json.loads((out / "metrics.json").read_text())["metrics"]
        if "task_version" in metric["conditions"]
    ]
    assert {metric["name"] for metric in metrics} == {
        "mine acc", "mine acc_norm", "word perplexity", "word acc", "roll word_perplexity"
    }  # fmt: skip
    for metric in metrics:
        task, name = metric["name"].split()
        values = theirs["results"][task]
        assert metric["value"] == values[f"{name},none"]
        spread = values[f"{name}_stderr,none"]
        if "acc" in name:  # Wilson's interval of one standard error: z = 1
            share, count = metric["value"], metric["conditions"]["samples"]
            half = (share * (1 - share) / count + 1 / (4 * count**2)) ** 0.5
            middle = share + 1 / (2 * count)
            ends = [(middle + sign * half) / (1 + 1 / count) for sign in (-1, 1)]
            assert [metric["low"], metric["high"]] == pytest.approx(ends, abs=1e-12)
        else:
            assert metric["high"] == (None if spread == "N/A" else metric["value"] + spread)
        seeds = [
            theirs["config"][f"{kind}_seed"] for kind in ("random", "numpy", "torch", "fewshot")
        ]
        assert metric["conditions"]["seed"] == ",".join(map(str, seeds))
        assert metric["conditions"]["num_fewshot"] == theirs["n-shot"][task] == 2
    for task in ("mine", "word"):
        (file,) = (tmp_path / "theirs").rglob(f"samples_{task}_*.jsonl")
        logged = [json.loads(line) for line in file.read_text().splitlines()]
        lines = (out / "samples" / "dense" / f"{task}.jsonl").read_text().splitlines()
        for item, other in zip(map(json.loads, lines), logged, strict=True):
            assert (item["doc"], item["target"]) == (
                other["doc"],
                json.loads(json.dumps(item["target"])),
            )
            their_answers = [[float(x) for x, *_ in r] for r in other["resps"]]
            assert [[float(x) for x, *_ in r] for r in item["resps"]] == their_answers
            assert item["prompt_hash"] == other["prompt_hash"]


def test_a_seed_chooses_the_examples(tmp_path: Path) -> None:
    task, model = write_yaml(tmp_path), tiny_model()
    runs = [quality(model, task, num_fewshot=1, seed=seed) for seed in (1, 1, 2)]
    values = [[(m.value, m.low) for m in metrics] for metrics in runs]
    assert values[0] == values[1]
    texts = {seed: examples(task, seed) for seed in (1, 2)}
    assert texts[1] != texts[2]


def examples(task: Path, seed: int) -> list[Any]:
    from lrcompress.evaluation.tasks.runner import TaskOptions, _build_requests

    tasks = resolve([str(task)], seed)
    _build_requests(None, tasks.tasks["mine"], tasks.seeds, TaskOptions(128, None, 1))
    return [request.arguments for request in tasks.tasks["mine"].instances]


def test_questions_become_messages_of_the_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (tmp_path / "chat.jinja").write_text(template)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match="the dense model has no chat template: give"):
        quality(tiny_model(), rows, apply_chat_template=True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = {"chat": True, "system_instruction": "Be brief.", "num_fewshot": 1}
    questions = {}
    for multiturn in (False, True):
        tasks = resolve([str(rows)])
        result = run_tasks(
            "m",
            (tiny_model(), tokenizer),
            tasks,
            TaskOptions(128, multiturn=multiturn, **options),  # type: ignore[arg-type]
        )
        (task,) = tasks.tasks.values()
        questions[multiturn] = task.instances[0].arguments[0]
        assert result.metrics[0].conditions["apply_chat_template"] is True
        assert result.logs["rows"][0]["arguments"][0][0] == questions[multiturn]
    start = "<system>Be brief.<user>"
    assert all(text.startswith(start) for text in questions.values())
    assert all(text.endswith("Number 0 of the list is<assistant>") for text in questions.values())
    assert [text.count("<user>") for text in questions.values()] == [1, 2]
    raw = quality(tiny_model(), rows)
    chat = quality(
        tiny_model(), rows, apply_chat_template=True, chat_template=str(tmp_path / "chat.jinja")
    )
    assert "apply_chat_template" not in raw[0].conditions
    assert raw[0].conditions["questions"] != chat[0].conditions["questions"]
