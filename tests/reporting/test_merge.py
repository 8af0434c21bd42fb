"""`lrcompress report` writes a report again, or merges several; `eval --write-card`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrcompress.config.recipe import read_recipe
from lrcompress.reporting import report
from lrcompress.reporting.differences import (
    BlockChange,
    Continuation,
    Differences,
    PositionLoss,
    TokenChange,
)
from lrcompress.reporting.merge import merge_reports
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import FORMATS, Report
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.folder import SweepFolder
from lrcompress.workflows.sweep.point import SweepPoint
from tests.conftest import SMALL, invoke

QUICK = ("--limit", "8", "--context-length", "64", "--compared-windows", "2")
SPEED = ("--prompt-length", "8", "--new-tokens", "2", "--repeats", "2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 200, "utf-8")
    return file


@pytest.fixture(scope="module")
def other(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama factorized at keep_ratio 0.4."""
    out = tmp_path_factory.mktemp("other") / "model"
    result = invoke("factorize", dense, "--out", out, "--keep-ratio", "0.4", *SMALL)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def folders(
    dense: Path,
    factorized: Path,
    other: Path,
    words: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """Two evaluations of one dense model and a compressed one each, with speeds."""
    where = tmp_path_factory.mktemp("reports")
    for name, model in (("first", factorized), ("second", other)):
        result = invoke(
            "eval", model, "--baseline", dense, "--perplexity", words, *QUICK, *SPEED,
            "--prompt", "The quick", "--continuation-tokens", "4", "--out", where / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    return where / "first", where / "second"


def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lrcompress.checkpoint.record.load_model", loads)
    monkeypatch.setattr("lrcompress.workflows.sweep.sweep.load_model", loads)


def test_a_report_is_written_again_byte_for_byte(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads_nothing(monkeypatch)
    out = tmp_path / "again"
    result = invoke("report", folders[0], "--out", out)
    assert result.exit_code == 0, result.output
    assert "token perplexity" in result.stdout
    assert {path.name for path in out.iterdir()} == {*FORMATS, "figures"}
    for name in FORMATS:
        assert (out / name).read_bytes() == (folders[0] / name).read_bytes()
    twice = invoke("report", folders[0], out, "--json")
    assert twice.stdout == (folders[0] / "metrics.json").read_text()


def test_two_reports_become_one_comparison(
    dense: Path,
    factorized: Path,
    other: Path,
    words: Path,
    folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    out, together = tmp_path / "joined", tmp_path / "together"
    result = invoke("report", *folders, "--out", out)
    assert result.exit_code == 0, result.output
    evaluation = invoke(
        "eval", other, "--baseline", dense, "--baseline", factorized, "--perplexity", words, *QUICK,
        "--no-speed", "--prompt", "The quick", "--continuation-tokens", "4", "--out", together,
    )  # fmt: skip
    assert evaluation.exit_code == 0, evaluation.output
    joined, measured = report.read(out), report.read(together)
    names = dict(
        zip(("dense", "factorized first", "factorized second"), models(measured), strict=True)
    )
    assert models(joined) == tuple(names)
    assert [replace(m, model=names[m.model]) for m in joined.metrics] == list(measured.metrics)
    compared = [replace(c, model=names[c.model]) for c in joined.comparisons]
    assert compared == list(measured.comparisons)
    for mine, theirs in zip(joined.details.tokens, measured.details.tokens, strict=True):
        assert replace(mine, model=names[mine.model]) == theirs
    assert [b.model for b in joined.details.blocks] == list(names)[1:]
    (prompt,) = joined.details.continuations
    assert {names[k]: v for k, v in prompt.texts.items()} == measured.details.continuations[0].texts
    for page in ("report.md", "report.html"):
        assert "speeds are left out" in (out / page).read_text()
    assert f"training and ranks of {folders[0]} are left out" in result.stdout
    assert joined.described == "factorized second"
    calibrated = [text.model for text in joined.texts if text.use == "calibration"]
    assert calibrated == ["factorized first", "factorized second"]
    assert invoke("report", out, "--json").stdout == (out / "metrics.json").read_text()


def models(evaluated: Report) -> tuple[str, ...]:
    return tuple(dict.fromkeys(metric.model for metric in evaluated.metrics))


def metric(model: str, value: float, name: str = "task acc", **more: Any) -> Metric:
    return Metric(model, name, value, "", True, more, samples=[[value, 1]] * 8)


def test_the_model_of_the_record_keeps_its_name_in_another_place() -> None:
    calibration = {"data": "c.txt", "tokens": 8, "sha256": "1"}
    last, first = metric("low", 0.5), metric("dense", 0.5, q=1)
    one = Report("a", (first, last), record={"calibration": {**calibration, "sha256": "2"}})
    two = Report("b", (first, metric("other", 0.25)))
    three = Report("c", (first, last), record={"calibration": calibration})
    merged = merge_reports({"one": one, "two": two, "three": three})
    assert models(merged) == ("dense", "low", "other")
    assert merged.described == "low"
    assert [(text.model, text.sha256) for text in merged.texts] == [("low", "2"), ("low", "1")]


def test_only_equal_numbers_of_quality_make_one_model() -> None:
    sizes = [Metric(name, "parameters", 10, "", False) for name in ("dense", "small")]
    measured = (sizes[0], metric("dense", 0.5), sizes[1], metric("small", 0.25))
    first = Report("a", measured, record={"notes": ["39 % are kept"]})
    more = (metric("dense", 0.75, "more acc"), metric("small", 0.75, "more acc"))
    second = Report("b", (metric("dense", 0.5), more[0], sizes[1], more[1]))
    joined = merge_reports({"runs/a": first, "runs/b": second})
    assert [(m.model, m.name) for m in joined.metrics] == [
        ("dense", "parameters"), ("dense", "task acc"), ("dense", "more acc"),
        ("small a", "parameters"), ("small a", "task acc"),
        ("small b", "parameters"), ("small b", "more acc"),
    ]  # fmt: skip
    assert joined.notes == ("runs/a: 39 % are kept",)
    shots = Report("c", (metric("dense", 0.5, num_fewshot=5),))
    assert models(merge_reports({"a": first, "c": shots})) == ("dense a", "small", "dense c")


def test_speeds_of_served_models_are_left_out() -> None:
    quality = Metric("small", "q acc", 0.5, "", True)
    speed = Metric("small", "decode, batch 8", 9, "tokens/s", True, rounds=[8, 9, 10])
    merged = merge_reports({"a": Report("a", (quality,)), "b": Report("b", (speed,))})
    assert [(metric.model, metric.name) for metric in merged.metrics] == [("small", "q acc")]
    assert any("speeds are left out" in note for note in merged.notes)


def test_nan_values_are_equal_to_each_other() -> None:
    nan = float("nan")
    first = Report("a", (metric("dense", nan), metric("small", 0.5)))
    second = Report("b", (metric("dense", nan), metric("tiny", 0.5)))
    assert models(merge_reports({"a": first, "b": second})) == ("dense", "small", "tiny")


def test_details_of_all_are_kept_and_shown_where_they_fit_together(tmp_path: Path) -> None:
    def details(base: str, blocks: int) -> Differences:
        change = (base, "small", "text")
        positions = (PositionLoss(1, 63, 126, 2.0, 2.1),)
        tokens = TokenChange(*change, 64, 2, 126, 0.5, {"50": 0.1}, 0.9, positions, ())
        texts = (Continuation("Once", {base: f"upon {base}", "small": f" {blocks}"}),)
        return Differences((tokens,), (BlockChange(*change, 126, (0.5,) * blocks),), texts)

    def comparison(base: str, value: float, blocks: int) -> Report:
        metrics = (metric(base, 0.75), metric("small", value))
        return Report(base, metrics, details(base, blocks))

    joined = merge_reports({"a": comparison("dense", 0.5, 2), "b": comparison("dense", 0.25, 2)})
    assert [t.model for t in joined.details.tokens] == ["small a", "small b"]
    assert joined.details.comparable() == joined.details
    assert joined.details.continuations[0].texts == {
        "dense": "upon dense", "small a": " 2", "small b": " 2"
    }  # fmt: skip
    apart = merge_reports({"a": comparison("dense", 0.5, 2), "b": comparison("base", 0.25, 5)})
    report.write(tmp_path, apart)
    assert report.read(tmp_path).details == apart.details
    assert [b.baseline for b in apart.details.blocks] == ["dense", "base"]
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert text.count("changed most in block") == 1
        assert "are in metrics.json alone" in text


def test_max_loss_decides_on_the_joined_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    within = invoke("report", *folders, "--max-loss", "10000%")
    assert within.exit_code == 0
    assert "PASS" in within.stdout
    beyond = invoke("report", *folders, "--max-loss", "1e-9", "--json")
    assert beyond.exit_code == 3
    assert "FAIL" in beyond.stderr
    assert json.loads(beyond.stdout)["title"].endswith("second: comparison")


def _damaged(folder: Path, source: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_what_cannot_be_read_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    text = (folders[0] / "metrics.json").read_text()
    (tmp_path / "cut" / "metrics.json").write_text(text[: len(text) // 2])
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "metrics.json").write_text("[]")
    cases: dict[Path, str] = {
        tmp_path / "empty": "has no metrics.json",
        tmp_path / "nowhere": "has no metrics.json",
        tmp_path / "cut": "metrics.json' is damaged (",
        tmp_path / "list": "is damaged (no object)",
        _damaged(tmp_path / "later", folders[0], version=2): "has version 2 of the layout",
        _damaged(tmp_path / "older", folders[0], version=None): "has version none of the layout",
        _damaged(tmp_path / "odd", folders[0], metrics=[{"model": 1}]): "metrics.0.model: input",
    }
    for folder, sentence in cases.items():
        result = invoke("report", folders[1], folder, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    taken = invoke("report", folders[0], "--out", folders[1])
    assert taken.exit_code == 2
    assert "exists: choose another" in taken.stderr


@pytest.fixture(scope="module")
def swept(dense: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep, and what `sweep --json` printed."""
    where = tmp_path_factory.mktemp("sweep")
    recipe = {
        "model": {"source": str(dense)},
        "calibration": {"num_samples": 4, "seq_len": 64},
        "evaluate": {"perplexity": str(words), "context_length": 64, "limit": 4, "speed": False},
        "sweep": {"keep_ratios": [0.8, 0.5], "methods": ["svd"]},
    }
    (where / "recipe.yaml").write_text(json.dumps(recipe))
    result = invoke("sweep", where / "recipe.yaml", where / "out", "--json")
    assert result.exit_code == 0, result.output
    return where / "out", result.stdout


def test_sweep_prints_its_json(swept: tuple[Path, str]) -> None:
    assert swept[1] == (swept[0] / "sweep.json").read_text()
    assert len(json.loads(swept[1])["points"]) == 3


def test_the_report_of_a_sweep_is_written_again(
    swept: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads_nothing(monkeypatch)
    folder, out = swept[0], tmp_path / "again"
    result = invoke("report", folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert "svd at 0.5" in result.stdout
    for name in sweep_report.FORMATS:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert invoke("report", folder, "--json").stdout == swept[1]


def test_a_sweep_without_its_points_or_with_others_is_refused(
    swept: tuple[Path, str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(swept[0], tmp_path / "sweep")
    (folder / "points" / "svd-0.5.json").write_text("{")
    bare = shutil.copytree(swept[0], tmp_path / "bare")
    (bare / "sweep.json").unlink()
    cases: dict[tuple[object, ...], str] = {
        (folder,): "svd-0.5.json' is missing or damaged",
        (bare,): "has no sweep.json",
        (swept[0], folders[0]): "cannot be joined",
        (swept[0], "--max-loss", "1%"): "not of a sweep",
    }
    for arguments, sentence in cases.items():
        result = invoke("report", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2, result.output
        assert sentence in result.stderr
        assert not (tmp_path / "out").exists()


def test_points_that_change_take_the_report_with_them(
    swept: tuple[Path, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(swept[0], tmp_path / "sweep")

    def interrupted() -> SweepPoint:
        raise KeyboardInterrupt

    sweep = SweepFolder(read_recipe(folder / "recipe.yaml"), folder)
    with pytest.raises(KeyboardInterrupt):
        sweep.point("svd", 0.4, ["a point that is not there yet"], interrupted)
    assert (folder / "sweep.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        sweep.point("svd", 0.5, ["other inputs"], interrupted)
    assert not (folder / "sweep.json").exists()


def test_eval_writes_the_card_of_its_checkpoint(
    dense: Path, factorized: Path, words: Path, tmp_path: Path
) -> None:
    model, base = (
        shutil.copytree(source, tmp_path / source.parent.name) for source in (factorized, dense)
    )
    baseline = shutil.copytree(factorized, tmp_path / "baseline")
    options = (
        "--perplexity",
        words,
        *QUICK,
        "--no-speed",
        "--compared-windows",
        "0",
        "--write-card",
    )
    result = invoke("eval", model, "--baseline", base, "--baseline", baseline, *options, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    record = json.loads((model / "lrcompress.json").read_text())
    assert {key: record.pop(key) for key in ("metrics", "comparisons")} == {
        key: shown[key] for key in ("metrics", "comparisons")
    }
    assert record == json.loads((factorized / "lrcompress.json").read_text())
    card = (model / "README.md").read_text()
    for shown_there in ("token perplexity", "Is the difference real?", "from_pretrained("):
        assert shown_there in card
    assert not (base / "README.md").exists()
    assert (baseline / "README.md").read_bytes() == (factorized / "README.md").read_bytes()


def test_only_a_checkpoint_has_a_card(
    dense: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads_nothing(monkeypatch)
    for source in (dense, "some/model"):
        out = tmp_path / "out"
        result = invoke("eval", source, "--perplexity", words, "--write-card", "--out", out)
        assert result.exit_code == 2
        assert f"'{source}' is no checkpoint of lrcompress" in result.stderr
        assert not out.exists()


def test_a_recipe_of_one_line_is_enough(dense: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"model: {{source: {dense}}}\n")
    assert invoke("check", recipe).exit_code == 0
    quick = ("evaluate.limit=2", "evaluate.repeats=2", "calibration.num_samples=2")
    result = invoke("run", recipe, out, *(option for key in quick for option in ("--set", key)))
    assert result.exit_code == 0, result.output
    assert (out / "model" / "README.md").is_file()
    assert (out / "report.html").is_file()
