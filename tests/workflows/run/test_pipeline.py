"""`lrcompress run`: one folder, stages that are not done twice, nothing overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrcompress.benchmark import throughput
from lrcompress.config.recipe import Recipe, read_recipe
from lrcompress.evaluation import evaluate
from lrcompress.runtime.errors import InputError
from lrcompress.workflows.run import pipeline
from tests.conftest import invoke, small_recipe


@pytest.fixture
def recipe_file(dense: Path, text: Path, tmp_path: Path) -> Path:
    return small_recipe(tmp_path / "recipe.yaml", dense, text)


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


def test_run_leaves_a_model_and_a_report(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("run", recipe_file, out)
    assert result.exit_code == 0, result.output
    assert "token perplexity" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml", "model", "stages", "metrics.json", "metrics.csv", "report.md", "report.html",
        "figures",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    assert {metric["model"] for metric in metrics} == {"dense", "factorized"}
    record = json.loads((out / "model" / "lrcompress.json").read_text())
    assert record["metrics"] == metrics
    assert "token perplexity" in (out / "model" / "README.md").read_text()
    assert read_recipe(out / "recipe.yaml") == read_recipe(recipe_file)


def test_interrupted_run_continues(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, speed = tmp_path / "out", throughput.generation_throughput

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "generation_throughput", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, out)
    assert not (out / "report.md").exists()
    written = (out / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(throughput, "generation_throughput", speed)

    def not_again(*_: object) -> None:
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(evaluate, "quality", not_again)
    monkeypatch.setattr(pipeline, "factorize_to", not_again)
    first = pipeline.run(recipe, out)
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.setattr(throughput, "generation_throughput", not_again)
    assert pipeline.run(recipe, out) == first


def test_other_recipe_needs_overwrite(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.run(recipe, out)
    before = (out / "metrics.json").read_text()
    other = read_recipe(recipe_file, ["factorize.keep_ratio=0.3"])
    with pytest.raises(InputError, match="another recipe"):
        pipeline.run(other, out)
    assert (out / "metrics.json").read_text() == before
    metrics = pipeline.run(other, out, overwrite=True)
    kept = {m.model: m.value for m in metrics if m.name == "FFN parameters"}
    assert kept["factorized"] / kept["dense"] == pytest.approx(0.3, abs=0.05)


def test_changed_evaluation_keeps_the_model(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline.run(recipe, out)
    written = (out / "model" / "model.safetensors").stat().st_mtime_ns
    pipeline.run(read_recipe(recipe_file, ["evaluate.limit=1"]), out, overwrite=True)
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_changed_source_is_done_again(recipe: Recipe, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    first = pipeline.run(recipe, out)
    text.write_text("Another text, with other words in it, so it measures otherwise. " * 100)
    second = pipeline.run(recipe, out)
    values = [[m.value for m in run if m.name == "token perplexity"] for run in (first, second)]
    assert values[0] != values[1]


def test_foreign_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is no run"):
        pipeline.run(recipe, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_stage_file_without_findings_is_made_again(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pipeline.run(recipe, out)
    file = out / "stages" / "quality-factorized.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"inputs": content["inputs"]}))
    assert pipeline.run(recipe, out) == first
    assert json.loads(file.read_text()) == content


def test_a_model_folder_that_no_run_began_is_left_alone(recipe_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "project" / "model" / "weights.txt"
    weights.parent.mkdir(parents=True)
    weights.write_text("mine")
    result = invoke("run", recipe_file, tmp_path / "project")
    assert result.exit_code == 2
    assert "is no run" in result.stderr
    assert weights.read_text() == "mine"
