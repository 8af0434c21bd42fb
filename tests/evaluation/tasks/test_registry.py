"""Tasks are found by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.evaluation.tasks.registry import resolve
from lrcompress.runtime.errors import InputError
from tests.evaluation.tasks.conftest import ROWS, write_rows, write_yaml


def test_a_task_is_named_once(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a" / "same.jsonl", ROWS)
    second = write_rows(tmp_path / "b" / "same.jsonl", ROWS)
    with pytest.raises(InputError, match=r"task 'same' is given twice, as .*a/same.* and .*b/same"):
        resolve([str(first), str(second)])
    assert list(resolve([str(first), str(first)]).tasks) == ["same"]


def test_questions_in_every_form_of_rows(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    write_rows(tmp_path / "plain.jsonl", ROWS)
    lines = (tmp_path / "plain.jsonl").read_text().replace("\n", "\r\n")
    (tmp_path / "windows.jsonl").write_text(lines, "utf-8-sig", newline="")
    for name, task in resolve([str(file) for file in sorted(tmp_path.iterdir())]).tasks.items():
        assert name in {"array", "plain", "windows"}
        assert [row["query"] for row in task.test_docs()] == [row["query"] for row in ROWS]


def test_a_group_file_finds_the_tasks_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    for name in ("first_of_two", "second_of_two"):
        write_yaml(folder, name, text="!function utils.prompt")
    (folder / "utils.py").write_text('def prompt(doc):\n    return "Q: " + doc["query"]\n')
    (folder / "both.yaml").write_text(
        "group: both_of_two\ntask: [first_of_two, second_of_two]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = resolve([str(folder / "both.yaml")])
    assert list(found.groups) == ["both_of_two"]
    assert list(found.tasks) == ["first_of_two", "second_of_two"]
    task = found.tasks["first_of_two"]
    assert task.doc_to_text(ROWS[0]) == "Q: Number 0 of the list is"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def prompt(doc)\n    return 1\n", r"expected ':' \(utils.py, line 1\)"),
        (
            "import mine_lost\n",
            "No module named 'mine_lost': install it, put it beside the task, or name",
        ),
        ("x = {}['no such']\n", "KeyError 'no such'"),
        ("raise ValueError\n", "ValueError"),
    ],
)
def test_faults_in_the_code_of_a_task_are_one_sentence(
    code: str, reason: str, tmp_path: Path
) -> None:
    task = write_yaml(tmp_path, text="!function utils.prompt")
    (tmp_path / "utils.py").write_text(code)
    with pytest.raises(InputError, match=f"mine.yaml' cannot be run: {reason}"):
        resolve([str(task)])


def test_a_folder_that_is_named_like_a_task_is_not_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "piqa" / "validation.jsonl", [{"text": "words"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="task 'piqa'"):
        resolve(["piqa"], None, tmp_path)
