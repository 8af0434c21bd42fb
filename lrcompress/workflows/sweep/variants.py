"""The variants of a sweep: the factorize and refine sections of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lrcompress.config import BUDGETS, FactorizeSettings, RefineSettings
from lrcompress.config.recipe import Recipe, flags, sections, sections_from_flat
from lrcompress.runtime.errors import InputError

# keys that a variant cannot set: all variants compress the same linears, calibrated once
SHARED_KEYS = ("include", "exclude", "dense_first", "effort")
# keys that a variant with a method does not take from the recipe: they would override the
# method's defaults
METHOD_KEYS = ("method", "method_options", "ranks", "ranks_options", "form")


@dataclass(frozen=True)
class Variant:
    """A name with the settings that compress every point of it."""

    name: str
    factorize: FactorizeSettings
    refine: RefineSettings


def variants(recipe: Recipe) -> Iterator[Variant]:
    """The methods and variants of the recipe's sweep; its own factorize section if it has none.

    A variant that names a method has that method's defaults; all other keys that a variant does
    not set are the recipe's. Raises InputError for a key that a variant cannot set.
    """
    settings = recipe.sweep
    changes = {method: {"method": method} for method in settings.methods} | settings.variants
    for name, values in (changes or {recipe.factorize.method: {}}).items():
        yield _variant(recipe, name, values)


def _variant(recipe: Recipe, name: str, values: dict[str, Any]) -> Variant:
    key_path = partial(_key_path, name)
    for key in (*BUDGETS, *SHARED_KEYS):
        if key in values:
            raise InputError(f"{key_path(key)}: it holds for all variants; set it outside of them")
    base = recipe.factorize.model_dump(exclude={*BUDGETS, *METHOD_KEYS})
    base |= {flag: getattr(recipe.refine, key) for flag, key in flags(RefineSettings).items()}
    base["keep_ratio"] = recipe.sweep.keep_ratios[0]
    if "method" not in values:
        base |= recipe.factorize.model_dump(include={*METHOD_KEYS})
    checked = sections_from_flat(sections("factorize", "refine"), base | values, key_path)
    return Variant(name, checked["factorize"], checked["refine"])


def _key_path(variant: str, key: str) -> str:
    """The recipe key of a variant's setting, for error messages."""
    return f"sweep.variants.{variant}.{key}"
