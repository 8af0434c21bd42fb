"""The settings of a sweep's variants, and the keys that they cannot set."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrcompress.runtime.errors import InputError
from lrcompress.workflows.sweep.variants import variants
from tests.workflows.sweep.conftest import sweep_recipe


def test_without_variants_the_recipe_itself_is_swept(source: Path) -> None:
    (variant,) = variants(sweep_recipe(source))
    assert (variant.name, variant.factorize.method) == ("auto", "auto")


def test_variants_without_a_method_are_the_recipes_otherwise(source: Path) -> None:
    settings = sweep_recipe(source, variants={"anchored": {"sequential": "anchored"}})
    settings = settings.model_copy(
        update={"factorize": settings.factorize.model_copy(update={"method": "nystrom"})}
    )
    variant = next(variants(settings))
    assert (variant.factorize.method, variant.factorize.sequential) == ("nystrom", "anchored")


def test_variants_have_their_own_defaults(source: Path) -> None:
    variant = next(variants(sweep_recipe(source, methods=["nystrom"])))
    assert (variant.factorize.ranks, variant.factorize.form) == ("loss_aware", "pivoted")
    assert variant.factorize.rank_multiple == 2


def test_a_variant_may_have_a_target(source: Path) -> None:
    changes = {"llama.cpp": {"target": "gguf"}, "stock ppm": {"target": "stock", "method": "ppm"}}
    first, second = variants(sweep_recipe(source, variants=changes))
    assert (first.factorize.target, first.factorize.method) == ("gguf", "auto")
    assert (second.factorize.target, second.factorize.ranks) == ("stock", "uniform")
    with pytest.raises(InputError, match="svd makes low-rank layers, which --for gguf leaves out"):
        list(variants(sweep_recipe(source, variants={"x": {"target": "gguf", "method": "svd"}})))


def test_wrong_settings_are_named(source: Path) -> None:
    with pytest.raises(InputError, match=r"x\.metod: unknown, did you mean 'method'"):
        list(variants(sweep_recipe(source, variants={"x": {"metod": "svd"}})))
    with pytest.raises(InputError, match=r"x\.include: it holds for all variants"):
        list(variants(sweep_recipe(source, variants={"x": {"include": ["a"]}})))
    with pytest.raises(InputError, match=r"x\.effort: it holds for all variants"):
        list(variants(sweep_recipe(source, variants={"x": {"effort": "best"}})))
    for name in ("dense", "a/b"):
        with pytest.raises(InputError, match="is not a valid name"):
            sweep_recipe(source, variants={name: {"method": "svd"}})
    with pytest.raises(InputError, match="unknown, choose from svd"):
        sweep_recipe(source, methods=["none"])
    with pytest.raises(InputError, match="is there twice"):
        sweep_recipe(source, keep_ratios=[0.3333333, 0.3333334])
