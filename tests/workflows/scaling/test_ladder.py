"""The ladder: which models are trained, and how long, by tokens or by another model's FLOPs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.config.recipe import ScalingRecipe, read_any_recipe, read_scaling_recipe
from lrcompress.runtime.errors import InputError
from lrcompress.workflows.scaling.ladder import ladder_models
from tests.tiny import byte_tokenizer


def test_models_of_one_ladder_have_equal_tokens_per_parameter(ladder: Path) -> None:
    recipe = read_scaling_recipe(ladder)
    models = {model.name: model for model in ladder_models(recipe, byte_tokenizer())}
    assert len(models) == 4 * 3
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.meta_model.parameters())
        parameters -= 2 * model.meta_model.get_input_embeddings().weight.numel()
        steps = 0.2 * parameters / (4 * 32)
        if model.variant == "guided":
            low = models[name.replace("guided", "low")]
            assert model.flops <= low.flops
            assert model.settings.step_limit <= low.settings.step_limit
        else:
            assert model.settings.step_limit == max(2, 2 * round(steps / 2))
    flops = [model.flops for model in models.values()]
    assert flops == sorted(flops)


def test_a_warm_start_costs_what_both_parts_cost(ladder: Path) -> None:
    recipe = read_scaling_recipe(ladder)
    warm = {"low": {"keep_ratio": 0.5}, "warm": {"keep_ratio": 0.5, "dense_share": 0.5}}
    update = {"variants": warm, "equal_flops": {}, "counted": "dense"}
    scaling = recipe.scaling.model_copy(update=update)
    models = {
        model.name: model
        for model in ladder_models(recipe.model_copy(update={"scaling": scaling}), byte_tokenizer())
    }
    for name, model in models.items():
        if model.variant == "warm":
            low, dense = (models[name.replace("warm", other)] for other in ("low", "dense"))
            assert model.settings.step_limit == low.settings.step_limit == dense.settings.step_limit
            assert model.flops == (low.flops + dense.flops) // 2
    update["variants"] = {"warm": warm["warm"] | {"dense_share": 0.1}}
    scaling = recipe.scaling.model_copy(update=update)
    with pytest.raises(
        InputError, match=r"dense_share 0\.1 of warm covers none or all of the 2 measurements"
    ):
        ladder_models(recipe.model_copy(update={"scaling": scaling}), byte_tokenizer())


@pytest.mark.parametrize("file", ["recipes/scaling.yaml", "recipes/scaling-tiny.yaml"])
def test_shipped_recipes_have_three_sizes_or_more(file: str) -> None:
    recipe = read_any_recipe(Path(file))
    assert isinstance(recipe, ScalingRecipe)
    models = ladder_models(recipe, byte_tokenizer())
    assert len({model.size for model in models}) >= 3
    assert all(model.settings.step_limit >= 2 for model in models)


def test_a_limit_of_flops_below_the_shortest_training_is_refused(ladder: Path) -> None:
    recipe = read_scaling_recipe(
        ladder, ["scaling.equal_flops={low: guided}", "scaling.tokens_per_parameter=0.001"]
    )
    assert ladder_models(recipe, byte_tokenizer())  # low trains fewer FLOPs than guided in 2 steps
    recipe = read_scaling_recipe(ladder, ["scaling.tokens_per_parameter=0.001"])
    with pytest.raises(InputError, match=r"guided at .* needs more FLOPs than low even in 2 steps"):
        ladder_models(recipe, byte_tokenizer())
