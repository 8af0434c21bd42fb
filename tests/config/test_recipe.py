"""Recipes: one definition for keys and flags, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from lrcompress.cli.app import eval_command, factorize_command
from lrcompress.config import (
    FactorizeSettings,
    FFNBenchSettings,
    PretrainSettings,
    SweepSettings,
)
from lrcompress.config.recipe import Recipe, flags, read_recipe, to_yaml
from lrcompress.runtime.errors import InputError
from tests.conftest import invoke

RECIPES = sorted(Path("recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.name)
def test_shipped_recipes_are_valid(file: Path) -> None:
    result = invoke("check", file)
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load(result.stdout)
    assert recipe["factorize"]["method"] if "factorize" in recipe else recipe["scaling"]["sizes"]


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {source: here}\nfactorize: {rank: 8, exclude: [a.*, b]}\n")
    recipe = read_recipe(file)
    file.write_text(to_yaml(recipe))
    assert read_recipe(file) == recipe


def test_shortest_recipe_has_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {source: here}\n")
    assert read_recipe(file).factorize.keep_ratio == 0.8


@pytest.mark.parametrize("share", ["80%", "80 %", 0.8, "0.8"])
def test_every_share_can_be_in_percent(share: object) -> None:
    assert FactorizeSettings.model_validate({"keep_ratio": share}).keep_ratio == 0.8
    assert PretrainSettings.model_validate({"keep_ratio": share}).keep_ratio == 0.8
    assert PretrainSettings(keep_ratio=0.5, dense_share=share, warm_up=share).dense_share == 0.8
    assert FFNBenchSettings.model_validate({"keep_ratios": share}).keep_ratios == (0.8,)
    assert SweepSettings.model_validate({"keep_ratios": [0.5, share]}).keep_ratios == (0.5, 0.8)
    assert SweepSettings.model_validate({"keep_ratios": f"{share},50%"}).keep_ratios == (0.8, 0.5)
    assert FactorizeSettings.model_validate(
        {"max_perplexity_increase": share}
    ).max_perplexity_increase == 0.8  # fmt: skip


def test_an_option_of_a_method_is_given_once() -> None:
    with pytest.raises(ValidationError, match="damping is given twice"):
        FactorizeSettings.model_validate(
            {"rank": 1, "method_options": ["damping=0.1", "damping=0.2"]}
        )


@pytest.mark.parametrize("share", ["-1%", "0%", 0, "101%", "nan", float("inf"), True, [0.5]])
def test_a_keep_ratio_is_above_0_and_at_most_1(share: object) -> None:
    for section in (FactorizeSettings, PretrainSettings):
        with pytest.raises(ValidationError):
            section.model_validate({"keep_ratio": share})


def test_every_recipe_key_is_a_flag_and_the_other_way_round() -> None:
    options: dict[str, set[str]] = {}
    for command in (factorize_command, eval_command):
        with command.make_context(command.name, ["x", "--out", "y"], resilient_parsing=True) as c:
            options[command.name or ""] = {
                p.name or "" for p in command.get_params(c) if "--help" not in p.opts
            }
    for command_name, sections, of_the_command in (
        ("factorize", ("model", "calibration", "factorize", "refine"), {"source", "out"}),
        ("eval", ("model", "evaluate"), {"source", "out", "write_card", "max_loss", "as_json"}),
    ):
        kinds = [Recipe.model_fields[section].annotation for section in sections]
        keys = {flag for kind in kinds for flag in flags(kind)}  # type: ignore[arg-type]
        assert options[command_name] == keys | of_the_command


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {source: x}\nfactorize: {keep_ration: 1}", "did you mean 'keep_ratio'?"),
        ("model: {source: x}\nfactorise: {}", "factorise: unknown key, did you mean 'factorize'?"),
        ("model: {source: x}\nfactorize: {keep_ratio: 7}", "factorize.keep_ratio: input should be"),
        ("model: {source: x}\nfactorize: {method: a, rank: 1}", "factorize.method: 'a' is unknown"),
        ("model: {source: x}\nfactorize: {}", "factorize: set exactly one of rank, keep_ratio"),
        ("model: {source: x}\ncalibration: {num_samples: no}", "calibration.num_samples"),
        ("factorize: {rank: 1}", "model: required"),
        ("model: {source: x}\nevaluate: 3", "evaluate: "),
        ("model: {source: x}\nmodel: {source: y}", "line 2 gives the key 'model' again"),
        (
            "model: {source: x}\nfactorize:\n  rank: 1\n  'rank': 2",
            "line 4 gives the key 'rank' ag",
        ),
        ("model: {source: x}\nfactorize: {keep_ratio: 80}", "less than or equal to 1, not 80"),
        (
            "model: {source: x}\nfactorize: {keep_ratio: many}",
            "'many' is not a share, write it like",
        ),
        ("- a list", "holds no keys"),
        ("a: [", "is not YAML"),
        ("", "holds no keys"),
    ],
)
def test_mistakes_name_the_key(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    result = invoke("check", file)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_set_overrides_keys(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {source: x}\n")
    changed = read_recipe(
        file, ["factorize.rank=12", "evaluate.tasks=a,b", "factorize.method_options.damping=0.1"]
    )
    assert changed.factorize.rank == 12
    assert changed.evaluate.tasks == ("a", "b")
    assert changed.factorize.method_options == {"damping": 0.1}
    with pytest.raises(InputError, match="has no '='"):
        read_recipe(file, ["factorize.rank"])
    with pytest.raises(InputError, match="is not a section"):
        read_recipe(file, ["model.source.deep=1"])


def test_a_recipe_in_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes("model: {source: café}".encode("latin-1"))
    with pytest.raises(InputError, match=r"recipe\.yaml' is not UTF-8 text: convert it$"):
        read_recipe(file)
