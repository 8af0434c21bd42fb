"""scaling: a ladder of models, resumable, shared, and reported in numbers, words and pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lrcompress.config.recipe import ScalingRecipe, read_any_recipe, read_scaling_recipe
from lrcompress.models.loading import load_tokenizer
from lrcompress.runtime.errors import InputError
from lrcompress.training.trainer import TextTrainer
from lrcompress.workflows.scaling import study as scaling_study
from lrcompress.workflows.scaling.comparison import laws, matched, paired, verdicts
from lrcompress.workflows.scaling.ladder import rungs
from lrcompress.workflows.scaling.point import ScalingPoint, Shard
from lrcompress.workflows.scaling.report import FORMATS
from tests.conftest import interrupt, invoke
from tests.tiny import byte_tokenizer, tiny_model

WIDTHS = (16, 24, 32)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over three tiny llamas."""
    folder = tmp_path_factory.mktemp("ladder")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    for width in WIDTHS:
        model = tiny_model(hidden_size=width, intermediate_size=3 * width)
        model.config.save_pretrained(folder / f"w{width}")
    seeds = {width: 2 if width == WIDTHS[0] else 1 for width in WIDTHS}
    content = {
        "pretrain": {
            "data": ["pydoc"],
            "tokenizer": str(folder / "tokenizer"),
            "train_length": 32,
            "batch_size": 4,
            "learning_rate": 0.01,
            "rank_multiple": 2,
        },
        "scaling": {
            "sizes": {str(folder / f"w{width}"): {"seeds": n} for width, n in seeds.items()},
            "variants": {
                "low": {"keep_ratio": 0.5},
                "guided": {"keep_ratio": 0.5, "self_guided": "full"},
            },
            "equal_flops": {"guided": "low"},
            "tokens_per_parameter": 0.2,
            "test_sequences": 4,
            "measurements": 2,
            "resamples": 50,
            "speed_repeats": 2,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def study(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    result = invoke("scaling", ladder, out)
    assert result.exit_code == 0, result.output
    assert "## In words" in result.output
    return out


def test_the_ladder_has_equal_tokens_per_parameter(ladder: Path) -> None:
    recipe = read_scaling_recipe(ladder)
    found = {rung.name: rung for rung in rungs(recipe, byte_tokenizer())}
    assert len(found) == 4 * 3
    for name, rung in found.items():
        own = sum(p.numel() for p in rung.bare.parameters())
        own -= 2 * rung.bare.get_input_embeddings().weight.numel()
        steps = 0.2 * own / (4 * 32)
        if rung.variant == "guided":
            assert rung.flops <= found[name.replace("guided", "low")].flops
            assert (
                rung.settings.max_steps <= found[name.replace("guided", "low")].settings.max_steps
            )
        else:
            assert rung.settings.max_steps == max(2, 2 * round(steps / 2))
    flops = [rung.flops for rung in found.values()]
    assert flops == sorted(flops)


def test_a_warm_start_costs_what_both_parts_cost(ladder: Path) -> None:
    recipe = read_scaling_recipe(ladder)
    warm = {"low": {"keep_ratio": 0.5}, "warm": {"keep_ratio": 0.5, "dense_share": 0.5}}
    update = {"variants": warm, "equal_flops": {}, "counted": "dense"}
    scaling = recipe.scaling.model_copy(update=update)
    found = {
        r.name: r for r in rungs(recipe.model_copy(update={"scaling": scaling}), byte_tokenizer())
    }
    for name, rung in found.items():
        if rung.variant == "warm":
            low, dense = (found[name.replace("warm", other)] for other in ("low", "dense"))
            assert rung.settings.max_steps == low.settings.max_steps == dense.settings.max_steps
            assert rung.flops == (low.flops + dense.flops) // 2
    update["variants"] = {"warm": warm["warm"] | {"dense_share": 0.1}}
    scaling = recipe.scaling.model_copy(update=update)
    with pytest.raises(InputError, match=r"dense_share 0\.1 of warm is no part of 2 measurements"):
        rungs(recipe.model_copy(update={"scaling": scaling}), byte_tokenizer())


def test_shards_are_the_whole() -> None:
    items = list(range(11))
    parts = [Shard(number, 3).of(items) for number in (1, 2, 3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_report(study: Path) -> None:
    assert set(FORMATS) <= {path.name for path in study.iterdir()}
    content = json.loads((study / "scaling.json").read_text())
    assert len(content["points"]) == 12
    assert not content["missing"]
    assert {one["axis"] for one in content["laws"]} == {"flops", "non_embedding", "seconds"}
    assert content["paired"][0]["count"] == 4
    rows = list(csv.DictReader((study / "scaling.csv").read_text().splitlines()))
    for row, point in zip(rows, content["points"], strict=True):
        assert float(row["loss"]) == point["loss"] < point["curve"][0][1]
    report = (study / "scaling.md").read_text()
    assert "FFN training (tokens/s)" in report
    assert "not comparable" not in report
    assert "Not whole" not in report
    assert (study / "scaling.html").read_text().count("<svg") == 3
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
    found, expected = (losses(folder) for folder in (out, study))
    assert found == {label: expected[label] for label in found}


def losses(folder: Path) -> dict[str, float]:
    content = json.loads((folder / "scaling.json").read_text())
    return {f"{p['size']} {p['variant']} {p['seed']}": p["loss"] for p in content["points"]}


def test_what_is_wrong_is_said(ladder: Path, study: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    for flags, out, words in (
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
        assert words in result.output, result.output


def test_check_reads_both_kinds(ladder: Path) -> None:
    result = invoke("check", ladder)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["scaling"]["tokens_per_parameter"] == 0.2


@pytest.mark.parametrize("file", ["recipes/scaling.yaml", "recipes/scaling-tiny.yaml"])
def test_shipped_recipes_are_sound(file: str) -> None:
    recipe = read_any_recipe(Path(file))
    assert isinstance(recipe, ScalingRecipe)
    found = rungs(recipe, byte_tokenizer())
    assert len({rung.size for rung in found}) >= 3
    assert all(rung.settings.max_steps >= 2 for rung in found)


def made(slopes: dict[str, float], noise: float = 0.004) -> list[ScalingPoint]:
    """Points of a known slope in nats per decade; the dense model is ahead at 1e12 FLOPs."""
    random, found = np.random.default_rng(1), []
    for variant, slope in slopes.items():
        for index, flops in enumerate(np.geomspace(1e12, 1e15, 4)):
            for seed in range(2):
                loss = 6 - slope * (np.log10(flops) - 12) + 0.1 * (variant != "dense")
                loss += noise * random.standard_normal()
                cost = (int(flops), float(flops) / 1e10, float(loss))
                counts = (1000 * 4**index, 500 * 4**index, 300 * 4**index, 8, 800)
                rest = (((0, 7.0),), "cpu", None)
                found.append(ScalingPoint(f"s{index}", variant, seed, *counts, *cost, *rest))
    return found


def test_a_steeper_law_is_said_to_be_steeper() -> None:
    points = made({"dense": 0.35, "steep": 0.40, "same": 0.35})
    found = laws(points, 200)
    said = {
        sentence.split(":")[0]: sentence
        for sentence in verdicts(found, points)
        if "FLOPs" in sentence
    }
    assert said["steep"].startswith("steep: steeper than dense per decade of training FLOPs: 0.4")
    assert "The fitted lines cross at" in said["steep"]
    assert said["same"].startswith("same: not shown to differ from dense")
    assert "cannot be said" in said["same"]
    line = next(
        one for one in found if (one.variant, one.axis, one.fit.law) == ("steep", "flops", "decade")
    )
    assert 0.40 in line.fit.slope
    assert line.against is not None
    assert line.against.crossing is not None
    assert 1e14 in line.against.crossing  # 0.1 nats behind, 0.05 gained a decade


def test_losses_at_equal_cost_are_interpolated() -> None:
    points = made({"dense": 0.35, "low": 0.35}, noise=1e-6)
    for one in matched(points, laws(points, 50)):
        assert one.difference is not None
        assert one.difference.value == pytest.approx(0.1, abs=1e-3)
        if one.loss is not None:
            assert one.loss - one.dense == pytest.approx(0.1, abs=1e-3)
    (pair,) = paired(points, {"low": "dense"})
    assert pair.verdict == "worse"
    assert pair.difference.value == pytest.approx(0.1, abs=1e-3)
    assert pair.count == 8


def test_the_tokenizer_is_kept(study: Path) -> None:
    (kept,) = (study / "tokenizer").iterdir()
    assert len(load_tokenizer(str(kept), None, False)) == 257
