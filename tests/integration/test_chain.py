"""`run` with a finetune section: factorize, finetune, evaluate, report; resumable at each."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lrcompress.config.recipe import Recipe, read_recipe
from lrcompress.evaluation import evaluate
from lrcompress.models import loading
from lrcompress.runtime.errors import InputError
from lrcompress.training.distillation import DistillationTrainer
from lrcompress.workflows.run import pipeline
from tests.conftest import SMALL, interrupt, invoke, small_recipe

MODELS = ["dense", "factorized", "finetuned"]


@pytest.fixture
def training_text(tmp_path: Path) -> Path:
    """Random letters, which no other text contains."""
    letters = random.Random(0).choices("abcdefgh ", k=6_000)
    file = tmp_path / "train.txt"
    file.write_text("".join(letters), "utf-8")
    return file


@pytest.fixture
def recipe_file(dense: Path, text: Path, training_text: Path, tmp_path: Path) -> Path:
    more = (
        f"finetune: {{data: {training_text}, max_steps: 4, eval_every: 2, held_out: 2,\n"
        "  train_length: 64, learning_rate: 0.003}\n"
    )
    return small_recipe(tmp_path / "recipe.yaml", dense, text, more)


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


def not_again(*_: object, **__: object) -> Any:
    raise AssertionError("a finished stage was done again")


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "stages").iterdir()}


def test_run_shows_all_three_side_by_side(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result = invoke("run", recipe_file, out)
    assert result.exit_code == 0, result.output
    assert "Held-out loss" in result.stdout
    assert "finetuned / dense" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml", "model", "finetuned", "stages", "metrics.json", "metrics.csv", "report.md",
        "report.html", "figures",
    }  # fmt: skip
    report = json.loads((out / "metrics.json").read_text())
    assert list(dict.fromkeys(metric["model"] for metric in report["metrics"])) == MODELS
    assert [text["use"] for text in report["texts"]] == ["calibration", "training", "evaluation"]
    assert all(len(text["sha256"]) == 64 and text["tokens"] > 0 for text in report["texts"])
    assert report["training"]["steps"] == 4
    assert "sketch" not in report["training"]
    for folder in ("model", "finetuned"):
        card = (out / folder / "README.md").read_text()
        assert "| metric | dense | factorized | finetuned | factorized / dense |" in card
        assert ("## Training" in card) == (folder == "finetuned")
        record = json.loads((out / folder / "lrcompress.json").read_text())
        assert record["metrics"] == report["metrics"]
    for name in ("report.md", "report.html"):
        shown = (out / name).read_text()
        for words in ("Texts", report["texts"][1]["sha256"], "Training", "tokens/s", "train.txt"):
            assert words in shown
    for module, stage in ((pipeline, "factorize_to"), (pipeline, "finetune_to")):
        monkeypatch.setattr(module, stage, not_again)
    monkeypatch.setattr(evaluate, "quality", not_again)
    assert invoke("run", recipe_file, out).exit_code == 0


def test_interrupted_training_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    loaded: list[str] = []
    load = loading.load_model

    def counted(settings: Any) -> Any:
        loaded.append(settings.source)
        return load(settings)

    monkeypatch.setattr(pipeline, "load_model", counted)
    steps = interrupt(monkeypatch, DistillationTrainer, "training_step", 4)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, out)
    assert not (out / "finetuned").exists()
    assert not (out / "report.md").exists()
    monkeypatch.setattr(pipeline, "factorize_to", not_again)
    loaded.clear()
    pipeline.run(recipe, out)
    assert len(steps) == 4 + 2  # from the checkpoint at step 2
    assert loaded.count(recipe.model.source) == 1  # teacher and dense model are one
    training = json.loads((out / "finetuned" / "lrcompress.json").read_text())["finetuned"]
    tokens = training["tokens_per_second"] * training["seconds"]
    assert tokens > 2 * 2 * 64  # of the last two steps alone
    assert not list(out.glob(".finetuned*"))


def test_changed_training_redoes_what_depends_on_it(
    recipe: Recipe, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pipeline.run(recipe, out)
    before = times(out)
    other = read_recipe(recipe_file, ["finetune.max_steps=2"])
    with pytest.raises(InputError, match="another recipe"):
        pipeline.run(other, out)
    assert times(out) == before
    monkeypatch.setattr(pipeline, "factorize_to", not_again)
    pipeline.run(other, out, overwrite=True)
    changed = {name for name, time in times(out).items() if time != before[name]}
    assert changed == {
        "details.json", "finetune.json", "quality-finetuned.json", "speed.json"
    }  # fmt: skip
    without = read_recipe(recipe_file, ["finetune.data=[]"])
    metrics = pipeline.run(without, out, overwrite=True)
    assert {metric.model for metric in metrics} == {"dense", "factorized"}
    assert not (out / "finetuned").exists()


def test_a_changed_model_is_trained_again(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pipeline.run(recipe, out)
    before = times(out)
    other = read_recipe(recipe_file, ["factorize.keep_ratio=0.4"])
    pipeline.run(other, out, overwrite=True)
    unchanged = {name for name, time in times(out).items() if time == before[name]}
    assert unchanged == {"quality-dense.json"}


def test_a_folder_of_the_users_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = recipe.model_copy(update={"finetune": type(recipe.finetune)()})
    pipeline.run(plain, out)
    (out / "finetuned").mkdir()
    (out / "finetuned" / "mine.txt").write_text("trained by hand")
    for refused in (plain, recipe):
        with pytest.raises(InputError, match="is no run"):
            pipeline.run(refused, out, overwrite=True)
    assert (out / "finetuned" / "mine.txt").is_file()


def test_a_recipes_baselines_come_first(recipe_file: Path, dense: Path, tmp_path: Path) -> None:
    settings = [f"evaluate.baseline={dense}", "finetune.data=[]", "evaluate.speed=false"]
    metrics = pipeline.run(read_recipe(recipe_file, settings), tmp_path / "first")
    assert list(dict.fromkeys(m.model for m in metrics)) == ["baseline", "factorized"]
    settings[0] = f"evaluate.baseline=[{dense}, {tmp_path / 'first' / 'model'}]"
    metrics = pipeline.run(read_recipe(recipe_file, settings), tmp_path / "second")
    labels = list(dict.fromkeys(m.model for m in metrics))
    assert {path.name for path in (tmp_path / "second" / "stages").glob("quality-b*")} == {
        "quality-baseline-1.json",
        "quality-baseline-2.json",
    }
    assert labels == [f"baseline {dense}", f"baseline {tmp_path / 'first' / 'model'}", "factorized"]


@pytest.mark.parametrize("use", ["calibration", "finetune"])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_a_text_is_not_both_learned_and_evaluated(
    recipe_file: Path, training_text: Path, tmp_path: Path, use: str, share: float
) -> None:
    learned = training_text.read_text()
    other = "".join(random.Random(1).choices("abcdefgh ", k=len(learned)))
    evaluated, cut = tmp_path / "test.txt", int(share * len(learned))
    evaluated.write_text(learned[:cut] + other[cut:])
    settings = {
        "calibration": [f"calibration.data={training_text}", "calibration.num_samples=40",
                        "finetune.data=[]"],
        "finetune": ["finetune.max_steps=40"],
    }[use]  # fmt: skip
    settings += [f"evaluate.perplexity={evaluated}", "evaluate.limit=null"]
    with pytest.raises(InputError, match=r"% of the evaluated text '.*test.txt' is in the text"):
        pipeline.run(read_recipe(recipe_file, settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_not_calibrated_on_what_it_evaluates(
    recipe_file: Path, text: Path, tmp_path: Path
) -> None:
    settings = ("--set", f"calibration.data={text}", "--keep-ratio", 0.6)
    result = invoke("sweep", recipe_file, tmp_path / "out", *settings)
    assert result.exit_code == 2, result.output
    assert "is to be calibrated on" in result.output
    result = invoke("sweep", recipe_file, tmp_path / "out", *settings, "--method", "svd")
    assert result.exit_code == 0, result.output


def test_eval_refuses_what_a_model_learned_from(
    dense: Path, training_text: Path, text: Path, tmp_path: Path
) -> None:
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    quick = ("--context-length", 64, "--no-speed", "--limit", 4)
    result = invoke("factorize", dense, "--out", small, "--keep-ratio", 0.6,
                    "--calibration", text, *SMALL)  # fmt: skip
    assert result.exit_code == 0, result.output
    flags = ("--data", training_text, "--max-steps", 40, "--train-length", 64, "--held-out", 2)
    assert invoke("finetune", small, "--out", tuned, *flags).exit_code == 0
    for model, spec, words in (
        (small, text, "factorized model was calibrated on"),
        (tuned, text, "finetuned model was calibrated on"),
        (tuned, training_text, "finetuned model was trained on"),
    ):
        out = tmp_path / "report"
        result = invoke("eval", dense, "--baseline", model, "--perplexity", spec, "--out", out,
                        *quick)  # fmt: skip
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert not out.exists()
    beside = ("--baseline", dense, "--baseline", small, "--perplexity", "pydoc", *quick)
    result = invoke("eval", tuned, *beside)
    assert result.exit_code == 0, result.output
    header = result.stdout.splitlines()[0].split()
    assert header[1:] == [*MODELS, "factorized", "/", "dense", "finetuned", "/", "dense"]


def test_a_second_training_remembers_the_first(
    factorized: Path, training_text: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--max-steps", 40, "--train-length", 64, "--held-out", 2)
    first, second = tmp_path / "first", tmp_path / "second"
    data = ("--data", training_text)
    assert invoke("finetune", factorized, "--out", first, *data, *flags).exit_code == 0
    assert invoke("finetune", first, "--out", second, "--data", text, *flags).exit_code == 0
    result = invoke("eval", second, "--perplexity", training_text, "--context-length", 64)
    assert result.exit_code == 2
    assert "was trained on" in result.output


def test_an_export_remembers_too(factorized: Path, text: Path, tmp_path: Path) -> None:
    """Also the model that is made of it, by a method that reads no text."""
    tuned, plain, again = tmp_path / "tuned", tmp_path / "plain", tmp_path / "again"
    flags = ("--data", text, "--max-steps", 2, "--train-length", 64, "--held-out", 2)
    assert invoke("finetune", factorized, "--out", tuned, *flags).exit_code == 0
    assert invoke("export", tuned, "--out", plain, "--to", "dense").exit_code == 0
    svd = ("--keep-ratio", 0.5, "--method", "svd")
    assert invoke("factorize", plain, "--out", again, *svd).exit_code == 0
    for model, label in ((plain, "dense"), (again, "factorized")):
        result = invoke("eval", model, "--perplexity", text, "--context-length", 64)
        assert result.exit_code == 2
        assert f"the {label} model was trained on" in result.output


def test_a_missing_teacher_is_said_at_once(recipe_file: Path, tmp_path: Path) -> None:
    for key in ("finetune.teacher", "evaluate.baseline"):
        result = invoke("run", recipe_file, tmp_path / "out", "--set", f"{key}=./nowhere")
        assert result.exit_code == 2
        assert "'./nowhere' does not exist" in result.output
        assert not (tmp_path / "out").exists()


def test_a_damaged_sketch_is_said(factorized: Path, text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(factorized, damaged)
    record = json.loads((damaged / "lrcompress.json").read_text())
    record["calibration"]["sketch"]["hashes"] = "AAA"
    (damaged / "lrcompress.json").write_text(json.dumps(record))
    result = invoke("eval", damaged, "--perplexity", text, "--context-length", 64)
    assert result.exit_code == 2
    assert "is damaged" in result.output
