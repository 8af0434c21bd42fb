"""lm-eval's tasks: its own numbers, nothing computed twice, logs kept, data from local copies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM

import lrcompress
from lrcompress.evaluation.tasks.cache import model_fingerprint
from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.reporting.metric import Metric
from lrcompress.runtime.errors import InputError
from tests.conftest import interrupt, invoke, small_recipe
from tests.tiny import byte_tokenizer, tiny_model

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
    found = lrcompress.evaluate(
        model, byte_tokenizer(), tasks=names, task_cache=str(cache), **settings
    )
    return [metric for metric in found if "task_version" in metric.conditions]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each forward pass of a llama."""
    return interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)


def test_batches_leave_nothing_out_and_change_nothing(tmp_path: Path) -> None:
    """Neither eight questions nor three texts are a multiple of the batch."""
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"{w} and " * 40} for w in WORDS[:3]])
    asked, model = (write_yaml(tmp_path), texts), tiny_model()
    one, several = (quality(model, *asked, batch_size=size) for size in (1, 5))
    assert [len(metric.samples) for metric in one if metric.name.startswith("mine")] == [8, 8]
    for found, other in zip(one, several, strict=True):
        assert (found.name, len(found.samples)) == (other.name, len(other.samples))
        assert other.value == pytest.approx(found.value, rel=1e-5)


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
    found = [
        metric
        for metric in json.loads((out / "metrics.json").read_text())["metrics"]
        if "task_version" in metric["conditions"]
    ]
    assert {metric["name"] for metric in found} == {
        "mine acc", "mine acc_norm", "word perplexity", "word acc", "roll word_perplexity"
    }  # fmt: skip
    for metric in found:
        task, name = metric["name"].split()
        values = theirs["results"][task]
        assert metric["value"] == values[f"{name},none"]
        spread = values[f"{name}_stderr,none"]
        assert metric["high"] == (None if spread == "N/A" else metric["value"] + spread)
        seeds = [
            theirs["config"][f"{kind}_seed"] for kind in ("random", "numpy", "torch", "fewshot")
        ]
        assert metric["conditions"]["seed"] == ",".join(map(str, seeds))
        assert metric["conditions"]["num_fewshot"] == theirs["n-shot"][task] == 2
    for task in ("mine", "word"):
        (file,) = (tmp_path / "theirs").rglob(f"samples_{task}_*.jsonl")
        logged = [json.loads(line) for line in file.read_text().splitlines()]
        kept = (out / "samples" / "dense" / f"{task}.jsonl").read_text().splitlines()
        for one, other in zip(map(json.loads, kept), logged, strict=True):
            assert (one["doc"], one["target"]) == (
                other["doc"],
                json.loads(json.dumps(one["target"])),
            )
            theirs_said = [[float(x) for x, *_ in r] for r in other["resps"]]
            assert [[float(x) for x, *_ in r] for r in one["resps"]] == theirs_said
            assert one["prompt_hash"] == other["prompt_hash"]


def test_a_seed_chooses_the_examples(tmp_path: Path) -> None:
    task, model = write_yaml(tmp_path), tiny_model()
    found = [quality(model, task, num_fewshot=1, seed=seed) for seed in (1, 1, 2)]
    values = [[(m.value, m.low) for m in metrics] for metrics in found]
    assert values[0] == values[1]
    texts = {seed: examples(task, seed) for seed in (1, 2)}
    assert texts[1] != texts[2]


def examples(task: Path, seed: int) -> list[Any]:
    from lrcompress.evaluation.tasks.runner import TaskOptions, _build_requests

    tasks = resolve([str(task)], seed)
    _build_requests(tasks.tasks["mine"], tasks.seeds, TaskOptions(128, None, 1))
    return [one.arguments for one in tasks.tasks["mine"].instances]


def test_again_costs_nothing(tmp_path: Path, dense: Path, passes: list[int]) -> None:
    tasks = (write_yaml(tmp_path), write_rows(tmp_path / "other.jsonl", ROWS[:4]))
    cache = tmp_path / "cache"
    first = quality(lrcompress.load(dense)[0], *tasks, cache=cache)
    assert len(passes) == 3 * (8 + 4)
    assert first == quality(lrcompress.load(dense)[0], *tasks, cache=cache)
    assert first == quality(tiny_model(), *tasks, cache=cache)  # wherever it comes from
    assert len(passes) == 3 * (8 + 4)
    assert first == quality(tiny_model(), *tasks)
    assert len(passes) == 2 * 3 * (8 + 4)


def change_rows(folder: Path, _: Any) -> None:
    write_rows(folder / "mine-rows.jsonl", [{**row, "gold": 0} for row in ROWS])


def change_prompt(folder: Path, _: Any) -> None:
    write_yaml(folder, text="'Q: {{query}}'")


def change_weights(_: Path, model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3


def change_config(_: Path, model: Any) -> None:
    model.config.rms_norm_eps = 0.1


CHANGES: dict[str, Callable[[Path, Any], None] | dict[str, Any]] = {
    "weights": change_weights,
    "config": change_config,
    "rows": change_rows,
    "prompt": change_prompt,
    "limit": {"limit": 4},
    "num_fewshot": {"num_fewshot": 1},
    "seed": {"seed": 5},
    "context": {"context_length": 64},
    "batch": {"batch_size": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_result_is_asked_anew(
    change: str, tmp_path: Path, passes: list[int]
) -> None:
    model, task, cache = tiny_model(), write_yaml(tmp_path), tmp_path / "cache"
    quality(model, task, cache=cache)
    before = len(passes)
    done = CHANGES[change]
    more = done if isinstance(done, dict) else {}
    if not isinstance(done, dict):
        done(tmp_path, model)
    changed = quality(model, task, cache=cache, **more)
    assert len(passes) > before
    assert changed == quality(model, task, **more)


def test_code_beside_a_task_file_counts(tmp_path: Path, passes: list[int]) -> None:
    (tmp_path / "words.py").write_text(
        "def right(doc):\n    return helper(doc)\ndef helper(doc):\n    return doc['gold']\n"
    )
    task = write_yaml(tmp_path)
    task.write_text(task.read_text().replace(": gold", ": !function words.right"))
    model, cache = tiny_model(), tmp_path / "cache"
    quality(model, task, cache=cache)
    before = len(passes)
    quality(model, task, cache=cache)
    assert len(passes) == before
    code = (tmp_path / "words.py").read_text().replace("doc['gold']", "0 * doc['gold'] + 1")
    (tmp_path / "words.py").write_text(code)
    quality(model, task, cache=cache)
    assert len(passes) == 2 * before


def test_tokenizer_and_tensors_are_in_the_model_fingerprint() -> None:
    model = tiny_model()
    mark = model_fingerprint(model, byte_tokenizer())
    used = byte_tokenizer()
    used(["a", "bb"], padding=True, truncation=True, max_length=8)
    assert model_fingerprint(tiny_model(), used) == mark
    assert model_fingerprint(model, byte_tokenizer(bos=True)) != mark
    assert model_fingerprint(tiny_model(seed=1), byte_tokenizer()) != mark
    assert model_fingerprint(tiny_model().to(torch.bfloat16), byte_tokenizer()) != mark


def test_an_added_task_is_computed_alone(tmp_path: Path, passes: list[int]) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    one, two = write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS[:2])
    first = quality(model, one, cache=cache)
    before = len(passes)
    both = quality(model, two, one, cache=cache)
    assert len(passes) == before + 3 * 2
    assert both[2:] == first


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"key": 1, "result": {"logs": []}}', None])
def test_a_damaged_file_is_made_anew(damage: str | None, tmp_path: Path, passes: list[int]) -> None:
    model, cache, task = tiny_model(), tmp_path / "cache", write_yaml(tmp_path)
    first = quality(model, task, cache=cache)
    before = len(passes)
    (file,) = (path for path in cache.rglob("*") if path.is_file())
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2] if damage is None else damage)
    assert quality(model, task, cache=cache) == first
    assert len(passes) == 2 * before
    assert file.read_text() == whole
    assert [path for path in cache.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("at", [10, 30])
def test_an_interrupted_evaluation_goes_on(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    tasks = (write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS))
    whole = quality(model, *tasks)
    with monkeypatch.context() as patch:
        interrupt(patch, LlamaForCausalLM, "forward", at)
        with pytest.raises(KeyboardInterrupt):
            quality(model, *tasks, cache=cache)
    more = interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)
    assert quality(model, *tasks, cache=cache) == whole
    assert len(more) == 2 * 3 * 8 - (at - 1)
    assert not list(cache.rglob("*.db"))


def test_texts_that_are_done_are_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny_model(), tmp_path / "cache"
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"{w} " * 40} for w in WORDS[:3]])
    whole = quality(model, texts)
    assert whole == quality(model, texts, cache=tmp_path / "other")
    count = interrupt(monkeypatch, LlamaForCausalLM, "forward", 0)
    quality(model, texts)
    total = len(count)
    with monkeypatch.context() as patch:
        done = interrupt(patch, LlamaForCausalLM, "forward", total)
        with pytest.raises(KeyboardInterrupt):
            quality(model, texts, cache=cache)
        assert len(done) == total
    count.clear()
    assert quality(model, texts, cache=cache) == whole
    assert 0 < len(count) <= total / 3 + 1


def test_damaged_answers_are_given_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, task = tiny_model(), tmp_path / "cache", write_yaml(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, LlamaForCausalLM, "forward", 5)
        with pytest.raises(KeyboardInterrupt):
            quality(model, task, cache=cache)
    (answers,) = cache.rglob("*.db")
    answers.write_bytes(b"no data base" * 100)
    assert quality(model, task, cache=cache) == quality(model, task)


def test_the_cache_can_be_off_and_is_where_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    model, task = tiny_model(), write_yaml(tmp_path)
    quality(model, task)
    result = invoke("eval", tmp_path, "--tasks", "no.yaml")
    assert "'no.yaml' does not exist" in result.stderr
    assert not (tmp_path / "caches").exists()
    lrcompress.evaluate(model, byte_tokenizer(), perplexity=[], speed=False, tasks=[str(task)])
    assert len(list((tmp_path / "caches" / "lrcompress" / "tasks").rglob("mine-*.json"))) == 1
    with pytest.raises(InputError, match="is not a folder that can be written: name another"):
        quality(model, task, cache=task / "under-a-file")


def logs(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_logs_stand_beside_the_report(dense: Path, factorized: Path, tmp_path: Path) -> None:
    tasks = f"{write_yaml(tmp_path)},{write_rows(tmp_path / 'my two.jsonl', ROWS[:2])}"
    outs = [tmp_path / "first", tmp_path / "again"]
    for out in outs:
        result = invoke(
            "eval", factorized, "--baseline", dense, "--perplexity", "", "--tasks", tasks,
            "--no-speed", "--context-length", "128", "--out", out,
            "--task-cache", tmp_path / "cache",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    found = logs(outs[0] / "samples")
    assert set(found) == {
        f"{model}/{task}.jsonl" for model in ("dense", "factorized") for task in ("mine", "my_two")
    }
    assert found == logs(outs[1] / "samples")
    items = [json.loads(line) for line in found["factorized/mine.jsonl"].splitlines()]
    assert [item["doc"]["query"] for item in items] == [row["query"] for row in ROWS]
    assert [item["target"] for item in items] == [row["gold"] for row in ROWS]
    first = items[0]
    assert first["arguments"][1] == [ROWS[0]["query"], " elppa"]
    assert first["acc"] == float(max(range(3), key=lambda i: first["resps"][i][0][0]) == 0)
    metrics = json.loads((outs[0] / "metrics.json").read_text())["metrics"]
    accuracy = next(m for m in metrics if (m["model"], m["name"]) == ("factorized", "mine acc"))
    assert accuracy["value"] == sum(item["acc"] for item in items) / 8


def test_run_keeps_logs_of_what_it_measured(dense: Path, text: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "recipe.yaml", dense, text)
    one, two = write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS[:2])
    command = ("run", recipe, tmp_path / "out", "--overwrite", "--set", "evaluate.speed=false")
    cases: list[tuple[object, str, set[str]]] = [
        (one, "[]", {"dense/mine.jsonl", "factorized/mine.jsonl"}),
        (two, "[]", {"dense/two.jsonl", "factorized/two.jsonl"}),
        (two, str(dense), {"baseline/two.jsonl", "factorized/two.jsonl"}),
        ("[]", "[]", set()),
    ]
    for tasks, baseline, names in cases:
        more = ("--set", f"evaluate.tasks={tasks}", "--set", f"evaluate.baseline={baseline}")
        for _ in range(2):  # the second time all stages are done
            result = invoke(*command, *more)
            assert result.exit_code == 0, result.output
            assert set(logs(tmp_path / "out" / "samples")) == names


def test_models_and_tasks_of_like_names_get_files_of_their_own() -> None:
    from lrcompress.runtime.paths import unique_file_names

    found = unique_file_names(["dense a/b", "dense a_b", "../x", "é:1", ""])
    assert list(found.values()) == ["dense_a_b", "dense_a_b-2", "_x", "é_1", "_"]


PIQA = [
    {"goal": f"Reach the {w}", "sol1": f"Take the {w}.", "sol2": "Sleep.", "label": i % 2}
    for i, w in enumerate(WORDS)
]
ARC = [
    {"id": str(i), "question": f"Which is a {w}?", "answerKey": "AB"[i % 2],
     "choices": {"text": [w, "none"], "label": ["A", "B"]}}
    for i, w in enumerate(WORDS)
]  # fmt: skip
COPA = [
    {"premise": f"The {w} fell.", "choice1": "It was loose.", "choice2": "It was night.",
     "question": "cause", "idx": i, "label": i % 2}
    for i, w in enumerate(WORDS)
]  # fmt: skip
WMDP = [
    {"question": f"A {w}?", "choices": list("wxyz"), "answer": i % 4} for i, w in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets with the columns of the original and rows of our own, in every accepted form."""
    folder = tmp_path_factory.mktemp("copies")
    splits = {split: Dataset.from_list(PIQA) for split in ("train", "validation")}
    DatasetDict(splits).save_to_disk(str(folder / "baber" / "piqa"))
    for split in ("train", "validation", "test"):
        write_rows(folder / "allenai__ai2_arc" / "ARC-Easy" / f"{split}.jsonl", ARC)
    copa = folder / "super_glue" / "copa"
    copa.mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_list(COPA).to_parquet(copa / f"{split}-00000-of-00001.parquet")
    for number, part in enumerate(("bio", "chem", "cyber"), 2):
        rows = Dataset.from_list(WMDP[:number], split="test")
        rows.save_to_disk(str(folder / "wmdp" / f"wmdp-{part}"))
    write_rows(folder / "boolq.jsonl", ROWS)
    return folder


def test_built_in_tasks_read_local_copies(copies: Path, tmp_path: Path) -> None:
    names = ("piqa", "arc_easy", "copa", "wmdp", "boolq")
    found = {m.name: m for m in quality(tiny_model(), *names, data_dir=str(copies))}
    assert found["piqa acc"].conditions["samples"] == 8
    assert found["boolq acc"].conditions["data"] == str(copies / "boolq.jsonl")
    assert "data" not in found["piqa acc"].conditions
    parts = [found[f"wmdp_{part} acc"].value for part in ("bio", "chem", "cyber")]
    pooled = sum(n * value for n, value in enumerate(parts, 2)) / 9
    assert found["wmdp acc"].value == pytest.approx(pooled)
    tasks = resolve([*names], None, copies).tasks
    for task in tasks.values():
        task.build_all_requests(limit=1)
    prompts = {name: task.instances[0].arguments for name, task in tasks.items()}
    assert prompts["piqa"] == ("Question: Reach the apple\nAnswer:", " Take the apple.")
    assert prompts["arc_easy"] == ("Question: Which is a apple?\nAnswer:", " apple")
    assert prompts["copa"] == ("The apple fell because", "  it was loose.")
    assert prompts["boolq"] == (ROWS[0]["query"], " apple")


def test_a_copy_that_is_not_there_is_no_reason_to_ask_the_hub(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[str] = []
    original = datasets.load_dataset

    def load(path: str, *more: Any, **named: Any) -> Any:
        asked.append(path)
        return original(path, *more, **named)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    write_rows(tmp_path / "piqa" / "validation.jsonl", PIQA)  # without its training examples
    write_rows(tmp_path / "boolq.jsonl", [{"question": "?"}])
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "allenai--sciq" / f"{split}.jsonl", PIQA)
    cases = {
        "hellaswag": r"task 'hellaswag': .* has no copy of its data set .* \(looked for "
        r"hellaswag.jsonl, .*hellaswag.*\)$",
        "arc_easy": r"task 'arc_easy': .*ai2_arc' cannot be read as a data set",
        "piqa": r"task 'piqa': .*piqa' does not have what it needs: 'train' is missing$",
        "sciq": "task 'sciq': .*sciq' does not have what it needs: 'support' is undefined$",
        "boolq": "task 'boolq' line 1: needs query",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            resolve([name], None, tmp_path)
    assert all(Path(path).is_dir() for path in asked)
    assert datasets.load_dataset is load
    with pytest.raises(InputError, match="data directory 'nowhere' does not exist: name a folder"):
        resolve(["piqa"], None, "nowhere")


def test_a_task_is_named_once(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a" / "same.jsonl", ROWS)
    two = write_rows(tmp_path / "b" / "same.jsonl", ROWS)
    with pytest.raises(InputError, match=r"task 'same' is given twice, as .*a/same.* and .*b/same"):
        resolve([str(one), str(two)])
    assert list(resolve([str(one), str(one)]).tasks) == ["same"]
