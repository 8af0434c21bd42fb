"""`lrcompress scaling`: trains a ladder, resumes, shares the work between shards, and reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from lrcompress.config.recipe import read_scaling_recipe
from lrcompress.models.loading import load_tokenizer
from lrcompress.training.trainer import TextTrainer
from lrcompress.workflows.scaling import study as scaling_study
from lrcompress.workflows.scaling.report import FORMATS
from tests.conftest import interrupt, invoke


@pytest.fixture(scope="module")
def study(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    result = invoke("scaling", ladder, out)
    assert result.exit_code == 0, result.output
    assert "## In words" in result.output
    return out


def test_the_report(study: Path) -> None:
    assert set(FORMATS) <= {path.name for path in study.iterdir()}
    content = json.loads((study / "scaling.json").read_text())
    assert len(content["points"]) == 12
    assert not content["missing"]
    assert {law["axis"] for law in content["laws"]} == {"flops", "non_embedding", "seconds"}
    assert content["paired"][0]["count"] == 4
    rows = list(csv.DictReader((study / "scaling.csv").read_text().splitlines()))
    for row, point in zip(rows, content["points"], strict=True):
        assert float(row["loss"]) == point["loss"] < point["curve"][0][1]
    report = (study / "scaling.md").read_text()
    assert "FFN training (tokens/s)" in report
    assert "not comparable" not in report
    assert "Not whole" not in report
    assert (study / "scaling.html").read_text().count("<figure") == 3
    kinds = [path.suffix for path in (study / "figures").iterdir()]
    assert sorted(kinds) == [".png"] * 3 + [".svg"] * 3
    assert not list((study / "training").glob("*"))
    result = invoke("report", study)
    assert result.exit_code == 2
    assert "is a scaling study: read its scaling.md" in result.output


def test_nothing_is_trained_twice(
    ladder: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (study / name).read_bytes() for name in FORMATS}
    monkeypatch.setattr(TextTrainer, "training_step", None)  # would fail if it were called
    assert len(scaling_study.scaling(read_scaling_recipe(ladder), study)) == 12
    assert {name: (study / name).read_bytes() for name in FORMATS} == before


def test_an_interrupted_study_goes_on_and_shards_add_up(
    ladder: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = ("variants={low: {keep_ratio: 0.5}}", "equal_flops={}", "speed_repeats=0")
    out, recipe = tmp_path / "out", read_scaling_recipe(ladder, [f"scaling.{key}" for key in less])
    with monkeypatch.context() as patch:
        interrupt(patch, TextTrainer, "training_step", 8)
        with pytest.raises(KeyboardInterrupt):
            scaling_study.scaling(recipe, out, shard=(2, 2))
    assert len(scaling_study.scaling(recipe, out, shard=(2, 2))) == 4
    assert "**Not whole**: 4 models" in (out / "scaling.md").read_text()
    assert len(scaling_study.scaling(recipe, out, shard=(1, 2))) == 8
    of_shards, of_study = losses(out), losses(study)
    assert of_shards == {label: of_study[label] for label in of_shards}


def losses(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "scaling.json").read_text())
    return {f"{p['size']} {p['variant']} {p['seed']}": p["loss"] for p in content["points"]}


def test_wrong_settings_are_named(ladder: Path, study: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for flags, out, message in (
        (("--shard", "3/2"), "out", "--shard '3/2'"),
        (("--set", "pretrain.data=[]"), "out", "pretrain.data"),
        (("--set", "pretrain.shard=true"), "out", "scaling --shard I/N"),
        (("--set", "scaling.variants.low.seed=3"), "out", "scaling.variants.low.seed"),
        (("--set", "scaling.variants.low.keep_ratio=2"), "out", "scaling.variants.low.keep_ratio"),
        (("--set", "scaling.equal_flops={guided: none}"), "out", "not one of the variants"),
        (
            ("--set", "scaling.sizes={nowhere: {}, b: {}, c: {}}"),
            "out",
            "no file, folder or preset",
        ),
        ((), "taken", "is no scaling study"),
        (
            ("--set", f"pretrain.data=['{text}']", "--set", "pretrain.train_length=64"),
            "out",
            "name another text as scaling.test",
        ),
    ):
        result = invoke("scaling", ladder, tmp_path / out, *flags)
        assert result.exit_code == 2, result.output
        assert message in result.output, result.output


def test_check_reads_both_kinds(ladder: Path) -> None:
    result = invoke("check", ladder)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["scaling"]["tokens_per_parameter"] == 0.2


def test_the_tokenizer_is_kept(study: Path) -> None:
    (tokenizer,) = (study / "tokenizer").iterdir()
    assert len(load_tokenizer(str(tokenizer), None, False)) == 257
