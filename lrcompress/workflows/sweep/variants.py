"""The variants of a sweep: what a recipe's sections become for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from lrcompress.config import BUDGETS, FactorizeSettings, RefineSettings
from lrcompress.config.recipe import Recipe, flags, sections, sections_from_flat
from lrcompress.runtime.errors import InputError

SELECTION = ("include", "exclude", "dense_first")
# what a variant decides as a whole: the recipe's own choice would hide a method's defaults
METHOD_KEYS = ("method", "method_options", "ranks", "ranks_options", "form")


@dataclass(frozen=True)
class Variant:
    name: str
    factorize: FactorizeSettings
    refine: RefineSettings


def variants(recipe: Recipe) -> Iterator[Variant]:
    """The recipe's own section if it names neither methods nor variants.

    A variant that names a method has that method's defaults; others are the recipe's otherwise.
    """
    shared = recipe.factorize.model_dump(exclude={*BUDGETS, *METHOD_KEYS})
    shared |= {flag: getattr(recipe.refine, key) for flag, key in flags(RefineSettings).items()}
    own = recipe.factorize.model_dump(include={*METHOD_KEYS})
    settings = recipe.sweep
    named = {method: {"method": method} for method in settings.methods} | settings.variants
    for name, values in (named or {recipe.factorize.method: {}}).items():
        say = partial(_say, name)
        for key in (*BUDGETS, *SELECTION):
            if key in values:
                raise InputError(f"{say(key)}: it holds for all variants; set it outside of them")
        flat = (
            shared | {"keep_ratio": settings.keep_ratios[0]} | ({} if "method" in values else own)
        )
        checked = sections_from_flat(sections("factorize", "refine"), flat | values, say)
        yield Variant(name, checked["factorize"], checked["refine"])


def _say(variant: str, key: str) -> str:
    return f"sweep.variants.{variant}.{key}"
