"""Sweeps: the numbers of single runs, shared measurements, nothing done twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lrcompress
from lrcompress import calibrate, calibration, compare
from lrcompress.cli import main
from lrcompress.points import Point
from lrcompress.protocols import InputError
from lrcompress.recipe import Recipe, checked
from lrcompress.sweep import sweep, variants
from tests.tiny import byte_tokenizer, tiny_model

TEXT = {"num_samples": 8, "gradient_samples": 4, "seq_len": 64}
EVALUATE: dict[str, Any] = {"perplexity": ["pydoc:test"], "context_length": 64, "limit": 4}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe(source: Path, **settings: Any) -> Recipe:
    return checked(
        Recipe,
        {
            "model": {"source": str(source)},
            "calibration": TEXT,
            "factorize": {"keep_ratio": 0.8, "rank_multiple": 2},
            "evaluate": EVALUATE,
            "sweep": {"keep_ratios": [0.8, 0.5], **settings},
        },
    )


def test_points_are_those_of_single_runs(source: Path, tmp_path: Path) -> None:
    named = {"refined": {"method": "auto", "refine": True, "refine_epochs": 2}}
    points = sweep(recipe(source, methods=["whitened"], variants=named), tmp_path / "out")
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
        done = lrcompress.factorize(model, tokenizer, **settings)
        found = lrcompress.evaluate(model, tokenizer, speed=False, **EVALUATE)
        assert done.selected.keep_ratio == point.kept
        expected = [m.value for m in point.metrics]
        assert [m.value for m in found] == pytest.approx(expected, rel=1e-4)
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert table.count("\n| refined |") == 2
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [Point.from_dict(point) for point in stored] == points
    assert points[1].memory is None or points[1].memory > 10**7


def test_nothing_is_measured_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    quality, moments = compare.quality, calibrate.measure_moments

    def counted(*arguments: Any) -> Any:
        measured.append(arguments[0])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return quality(*arguments)

    def calibrated(*arguments: Any) -> Any:
        measured.append("calibration")
        return moments(*arguments)

    monkeypatch.setattr(compare, "quality", counted)
    monkeypatch.setattr(calibration, "measure_moments", calibrated)
    wanted = recipe(source, methods=["whitened", "nystrom"])
    with pytest.raises(KeyboardInterrupt):
        sweep(wanted, tmp_path / "out")
    points = sweep(wanted, tmp_path / "out")
    assert measured[:3] == ["dense", "calibration", "whitened 0.8"]
    assert measured[3:] == [
        "calibration",
        "whitened 0.8",
        "whitened 0.5",
        "nystrom 0.8",
        "nystrom 0.5",
    ]
    assert sweep(wanted, tmp_path / "out") == points
    assert len(measured) == 8


def test_without_variants_the_recipe_itself_is_swept(source: Path) -> None:
    found = list(variants(recipe(source)))
    assert [(v.name, v.factorize.method) for v in found] == [("auto", "auto")]


def test_variants_without_a_method_are_the_recipes_otherwise(source: Path) -> None:
    wanted = recipe(source, variants={"anchored": {"sequential": "anchored"}})
    wanted = wanted.model_copy(
        update={"factorize": wanted.factorize.model_copy(update={"method": "nystrom"})}
    )
    found = next(variants(wanted))
    assert (found.factorize.method, found.factorize.sequential) == ("nystrom", "anchored")


def test_variants_have_their_own_defaults(source: Path) -> None:
    found = next(variants(recipe(source, methods=["nystrom"])))
    assert (found.factorize.ranks, found.factorize.form) == ("loss_aware", "pivoted")
    assert found.factorize.rank_multiple == 2


def test_what_is_wrong_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.metod: unknown, did you mean 'method'"):
        list(variants(recipe(source, variants={"x": {"metod": "svd"}})))
    with pytest.raises(InputError, match=r"x\.include: it holds for all variants"):
        list(variants(recipe(source, variants={"x": {"include": ["a"]}})))
    for name in ("dense", "a/b"):
        with pytest.raises(InputError, match="is no name"):
            recipe(source, variants={name: {"method": "svd"}})
    with pytest.raises(InputError, match="unknown, choose from svd"):
        recipe(source, methods=["none"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no sweep"):
        sweep(recipe(source), tmp_path)


def test_command(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    settings = copy.deepcopy(recipe(source).model_dump(mode="json"))
    file.write_text(json.dumps(settings))
    out = str(tmp_path / "out")
    done = CliRunner().invoke(
        main, ["sweep", str(file), out, "--keep-ratio", "0.6", "--method", "svd,whitened"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("\n| whitened |") == 1
    wrong = CliRunner().invoke(main, ["sweep", str(file), out, "--keep-ratio", "1.5"])
    assert wrong.exit_code == 2
    assert "keep_ratios" in wrong.output
