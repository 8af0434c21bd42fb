"""Built-in tasks read local copies of their data sets, and never the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.runtime.errors import InputError
from tests.evaluation.tasks.conftest import ROWS, WORDS, quality, write_rows
from tests.tiny import tiny_model

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
    metrics = {m.name: m for m in quality(tiny_model(), *names, data_dir=str(copies))}
    assert metrics["piqa acc"].conditions["samples"] == 8
    assert metrics["boolq acc"].conditions["data"] == str(copies / "boolq.jsonl")
    assert "data" not in metrics["piqa acc"].conditions
    subtasks = [metrics[f"wmdp_{part} acc"].value for part in ("bio", "chem", "cyber")]
    pooled = sum(n * value for n, value in enumerate(subtasks, 2)) / 9
    assert metrics["wmdp acc"].value == pytest.approx(pooled)
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

    paths: list[str] = []
    original = datasets.load_dataset

    def load(path: str, *more: Any, **named: Any) -> Any:
        paths.append(path)
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
        "boolq": "task 'boolq': .*boolq.jsonl' line 1 needs query",
    }
    for name, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            resolve([name], None, tmp_path)
    assert all(Path(path).is_dir() for path in paths)
    assert datasets.load_dataset is load
    with pytest.raises(InputError, match="data directory 'nowhere' does not exist: name a folder"):
        resolve(["piqa"], None, "nowhere")


def test_files_named_by_split_keep_their_names(tmp_path: Path) -> None:
    """`datasets` alone would read dev.jsonl as the split validation."""
    folder = tmp_path / "cais__mmlu" / "anatomy"
    rows = [{"question": w, "subject": "a", "choices": list("wxyz"), "answer": 1} for w in WORDS]
    for number, split in enumerate(("test", "validation", "dev"), 1):
        write_rows(folder / f"{split}.jsonl", [{**row, "subject": split} for row in rows[:number]])
    (task,) = resolve(["mmlu_anatomy"], None, tmp_path).tasks.values()
    assert {row["subject"] for row in task.fewshot_docs()} == {"dev"}
    assert [len(task.dataset[split]) for split in ("test", "validation", "dev")] == [1, 2, 3]
