"""Logs of questions and answers stand beside the report."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import invoke, small_recipe
from tests.evaluation.tasks.conftest import ROWS, write_rows, write_yaml


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
    files = logs(outs[0] / "samples")
    assert set(files) == {
        f"{model}/{task}.jsonl" for model in ("dense", "factorized") for task in ("mine", "my_two")
    }
    assert files == logs(outs[1] / "samples")
    items = [json.loads(line) for line in files["factorized/mine.jsonl"].splitlines()]
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
    mine, two = write_yaml(tmp_path), write_rows(tmp_path / "two.jsonl", ROWS[:2])
    command = ("run", recipe, tmp_path / "out", "--overwrite", "--set", "evaluate.speed=false")
    cases: list[tuple[object, str, set[str]]] = [
        (mine, "[]", {"dense/mine.jsonl", "factorized/mine.jsonl"}),
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

    names = unique_file_names(["dense a/b", "dense a_b", "../x", "é:1", ""])
    assert list(names.values()) == ["dense_a_b", "dense_a_b-2", "_x", "é_1", "_"]
