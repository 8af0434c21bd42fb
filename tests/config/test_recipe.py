"""Recipes: one definition for keys and flags, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lrcompress.cli.app import eval_command, factorize_command
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
