"""Sweeps: the numbers of single runs, shared measurements, nothing done twice."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import lrcompress
from lrcompress.benchmark import throughput
from lrcompress.cli.app import main
from lrcompress.compression.calibration import moments
from lrcompress.compression.calibration import session as calibration_session
from lrcompress.evaluation import evaluate
from lrcompress.methods import linalg, svd
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.svd import PlainSVD
from lrcompress.methods.types import FFN, LinearSpec, Statistics
from lrcompress.reporting.metric import Metric
from lrcompress.runtime.errors import InputError
from lrcompress.workflows.sweep.pareto import fronts
from lrcompress.workflows.sweep.report import FORMATS
from lrcompress.workflows.sweep.sweep import sweep
from tests.tiny import BLOCKS, saved_model
from tests.workflows.sweep.conftest import EVALUATE, TEXT, sweep_recipe

LINEARS = 3 * BLOCKS


def test_points_are_those_of_single_runs(source: Path, tmp_path: Path) -> None:
    named = {"refined": {"method": "auto", "refine": True, "refine_epochs": 2}}
    points = sweep(sweep_recipe(source, methods=["whitened"], variants=named), tmp_path / "out")
    assert [(p.variant, p.keep_ratio) for p in points] == [
        ("dense", 1.0),
        ("whitened", 0.8),
        ("whitened", 0.5),
        ("refined", 0.8),
        ("refined", 0.5),
    ]
    for point, keys in ((points[2], {"method": "whitened"}), (points[4], named["refined"])):
        model, tokenizer = lrcompress.load(source)
        settings: dict[str, Any] = TEXT | {"rank_multiple": 2, "keep_ratio": 0.5} | keys
        factorization = lrcompress.factorize(model, tokenizer, **settings)
        metrics = lrcompress.evaluate(model, tokenizer, **EVALUATE)
        assert factorization.selected.keep_ratio == point.kept
        expected = [m.value for m in point.metrics]
        assert [m.value for m in metrics] == pytest.approx(expected, rel=1e-4)
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert table.count("\n| refined |") == 2
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(p["variant"], p["keep_ratio"]) for p in stored["points"]] == [
        (p.variant, p.keep_ratio) for p in points
    ]
    assert points[1].memory is None or points[1].memory > 10**7


def test_nothing_is_measured_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    quality, measure_moments = evaluate.quality, moments.measure_moments

    def counted(*arguments: Any) -> Any:
        measured.append(arguments[0])
        if len(measured) == 4:
            raise KeyboardInterrupt
        return quality(*arguments)

    def calibrated(*arguments: Any, **keywords: Any) -> Any:
        measured.append("calibration")
        return measure_moments(*arguments, **keywords)

    monkeypatch.setattr(evaluate, "quality", counted)
    monkeypatch.setattr(calibration_session, "measure_moments", calibrated)
    recipe = sweep_recipe(source, methods=["whitened", "nystrom"])
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "out")
    points = sweep(recipe, tmp_path / "out")
    # without gradients, and with them
    assert measured[:4] == ["dense", "calibration", "calibration", "whitened at 0.8"]
    assert measured[4:] == [
        "calibration",
        "calibration",
        "whitened at 0.8",
        "whitened at 0.5",
        "nystrom at 0.8",
        "nystrom at 0.5",
    ]
    assert sweep(recipe, tmp_path / "out") == points
    assert len(measured) == 10


@pytest.mark.parametrize("method", ["svd", "whitened", "fisher", "auto"])
def test_weights_are_those_of_single_runs_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    state_dicts: list[dict[str, torch.Tensor]] = []

    def keep_weights(label: str, loaded: Any, *_: Any) -> evaluate.Results:
        state_dicts.append(loaded[0].state_dict())
        return evaluate.Results([], {})

    monkeypatch.setattr(evaluate, "quality", keep_weights)
    sweep(sweep_recipe(source, methods=[method]), tmp_path / "out")
    for ratio, weights in zip((0.8, 0.5), state_dicts[1:], strict=True):
        model, tokenizer = lrcompress.load(source)
        settings: dict[str, Any] = TEXT | {"rank_multiple": 2, "keep_ratio": ratio}
        lrcompress.factorize(model, tokenizer, method=method, **settings)
        alone = model.state_dict()
        assert weights.keys() == alone.keys()
        assert all(torch.equal(weights[name], alone[name]) for name in alone)


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_one_decomposition_serves_every_keep_ratio(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    solved, before, eigh = [0], list[int](), torch.linalg.eigh

    def counted(matrix: torch.Tensor) -> Any:
        solved[0] += 1
        return eigh(matrix)

    def noted(*_: Any) -> evaluate.Results:
        before.append(solved[0])
        return evaluate.Results([], {})

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    monkeypatch.setattr(evaluate, "quality", noted)
    sweep(sweep_recipe(source, methods=[method], keep_ratios=[0.8, 0.6, 0.4]), tmp_path / "out")
    dense, first, second, third = before
    assert dense == 0
    assert first >= LINEARS
    assert first == second == third


@pytest.mark.parametrize("method", ["fisher", "auto"])
def test_no_linear_is_decomposed_twice_in_one_shape(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    decomposed, requests = list[bytes](), [0]
    decompose, factors = linalg.decompose, DecompositionCache.factors

    def counted(weight: torch.Tensor, *arguments: Any) -> Any:
        decomposed.append(weight.numpy().tobytes())
        return decompose(weight, *arguments)

    def requested(*arguments: Any) -> Any:
        requests[0] += 1
        return factors(*arguments)

    monkeypatch.setattr(svd, "decompose", counted)
    monkeypatch.setattr(DecompositionCache, "factors", requested)
    ratios = [0.95, 0.93, 0.9, 0.88, 0.85, 0.8, 0.7, 0.6]
    plain = {"method": method, "method_options": {"shrinkage": 0, "output_shrinkage": 0}}
    sweep(sweep_recipe(source, variants={"plain": plain}, keep_ratios=ratios), tmp_path / "out")
    assert len(set(decomposed)) == len(decomposed) < requests[0]


def test_what_was_shared_counts_in_the_seconds_of_each_point() -> None:
    ffn = FFN("ffn", (), {"w": torch.eye(8)}, {}, {"w": Statistics()}, True)
    linear = LinearSpec("w", 0, "up", 8, 8, False, "in", "ffn")
    alone, shared = DecompositionCache(PlainSVD()), DecompositionCache(PlainSVD(), keep=True)
    for decompositions in (alone, shared):
        for rank in (2, 4):
            decompositions.factors(ffn, linear, rank)
    assert alone.saved == 0
    assert shared.saved > 0


class Interrupts:
    """A progress that presses Ctrl-C at its call number `at`; notes what was ended before."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls, self.ended = at, 0, list[str]()

    def __call__(self, items: Any, description: str, total: int | None = None) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self._noting(items, description)

    def _noting(self, items: Any, description: str) -> Any:
        yield from items
        self.ended.append(description)


def _without_times(folder: Path) -> Any:
    stored = json.loads((folder / "sweep.json").read_text())
    for point in stored["points"]:
        del point["seconds"], point["memory"]
    return stored


def _numbers(folder: Path) -> list[str]:
    """The lines of sweep.md, without the seconds and the memory of the first table."""
    lines = (folder / "sweep.md").read_text().splitlines()
    return [line.split(") ")[0] if "GiB" in line else line for line in lines]


def test_an_interrupted_sweep_ends_with_the_same_report(source: Path, tmp_path: Path) -> None:
    recipe = sweep_recipe(source, methods=["whitened", "auto"])
    whole = Interrupts()
    sweep(recipe, tmp_path / "whole", whole)
    assert whole.calls > 10
    for at in range(1, whole.calls + 1, 3):
        out, first, second = tmp_path / str(at), Interrupts(at), Interrupts()
        with pytest.raises(KeyboardInterrupt):
            sweep(recipe, out, first)
        sweep(recipe, out, second)
        measured = [name for name in first.ended + second.ended if "Perplexity" in name]
        assert len(measured) == len(set(measured)) == 5
        assert _without_times(out) == _without_times(tmp_path / "whole")
        assert _numbers(out) == _numbers(tmp_path / "whole")


def test_a_finished_sweep_loads_and_measures_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, again = sweep_recipe(source, methods=["whitened"]), Interrupts()
    points = sweep(recipe, tmp_path / "out")
    for name in FORMATS:
        (tmp_path / "out" / name).unlink()

    def loads(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lrcompress.workflows.sweep.sweep.load_model", loads)
    assert sweep(recipe, tmp_path / "out", again) == points
    assert again.calls == 0
    assert all((tmp_path / "out" / name).is_file() for name in FORMATS)


def test_speeds_are_measured_beside_the_dense_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, speed = list[list[str]](), throughput.generation_throughput

    def noted(models: Any, *arguments: Any) -> list[Metric]:
        turns.append(list(models))
        return speed(models, *arguments)

    monkeypatch.setattr(throughput, "generation_throughput", noted)
    recipe = sweep_recipe(source, methods=["svd"])
    quick = {"speed": True, "prompt_length": 8, "new_tokens": 2, "repeats": 2}
    evaluate = recipe.evaluate.model_copy(update=quick | {"training_speed": True})
    points = sweep(recipe.model_copy(update={"evaluate": evaluate}), tmp_path / "out")
    assert turns == [["dense"], ["dense", "svd at 0.8"], ["dense", "svd at 0.5"]]
    names = ["prefill", "decode", "training"]
    assert points[0].baseline == ()
    for point in points:
        speeds = [metric for metric in point.metrics if metric.name in names]
        assert [(m.model, m.name) for m in speeds] == [(point.label, n) for n in names]
    for point in points[1:]:
        assert [(m.model, m.name) for m in point.baseline] == [("dense", n) for n in names]
        assert point.baseline[0].value != points[0].metrics[-3].value
    costs = {front.cost.title for front in fronts(points)}
    assert {f"{name} speed over dense" for name in names} < costs
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "\n| point | prefill | decode | training |\n" in text


def test_report_has_tasks_differences_and_fronts(source: Path, tmp_path: Path) -> None:
    questions = tmp_path / "sums.jsonl"
    rows = [{"query": f"{i} is", "choices": ["a", " b"], "gold": i % 2} for i in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = sweep_recipe(source, methods=["svd"])
    evaluate = recipe.evaluate.model_copy(update={"tasks": (str(questions),), "limit": 8})
    points = sweep(recipe.model_copy(update={"evaluate": evaluate}), tmp_path / "out")
    text = (tmp_path / "out" / "sweep.md").read_text()
    for heading in ("Tasks", "Is the difference real?", "Trade-off"):
        assert f"\n## {heading}\n" in text
    (measured,) = re.findall(r"^- sums acc: (.*)$", text, re.MULTILINE)
    assert measured.startswith("task version 1.0, num fewshot 0, ")
    assert "samples 8" in measured.split(", ")
    compared = [point.label for point in points[1:]]
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    comparisons = [(c["metric"], c["model"]) for c in stored["comparisons"]]
    titles = ["token perplexity, pydoc:test", "sums acc", "sums acc_norm"]
    assert comparisons == [(title, label) for title in titles for label in compared]
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(point.metrics) for point in points)
    assert {line["samples"] for line in lines if line["name"] == "sums acc"} == {"8"}


def test_a_folder_with_other_files_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no sweep"):
        sweep(sweep_recipe(source), tmp_path)


def test_a_later_variant_that_does_not_fit_the_model_is_refused_first(tmp_path: Path) -> None:
    mixture = saved_model(tmp_path / "mixture", "mixtral")
    anchored = {"first": {}, "second": {"sequential": "anchored"}}
    with pytest.raises(InputError, match="anchored cannot fit mixtures of experts"):
        sweep(sweep_recipe(mixture, variants=anchored), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / "points").iterdir()] == ["dense.json"]


def test_command(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    settings = copy.deepcopy(sweep_recipe(source).model_dump(mode="json"))
    file.write_text(json.dumps(settings))
    out = str(tmp_path / "out")
    result = CliRunner().invoke(
        main, ["sweep", str(file), out, "--keep-ratio", "0.6", "--method", "svd,whitened"]
    )
    assert result.exit_code == 0, result.output
    for point in ("dense ", "svd at 0.6", "whitened at 0.6"):
        assert point in result.stdout
    assert "sweep.html" in result.stdout
    wrong = CliRunner().invoke(main, ["sweep", str(file), out, "--keep-ratio", "1.5"])
    assert wrong.exit_code == 2
    assert "keep_ratios" in wrong.output
