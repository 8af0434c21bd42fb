"""The ladder of a scaling recipe: which models, and for how many steps each trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lrcompress.benchmark import flops
from lrcompress.config import PretrainSettings
from lrcompress.config.recipe import ScalingRecipe, checked
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import embedding_count, parameter_count, sequence_length
from lrcompress.runtime.errors import InputError
from lrcompress.training.new_model import bare_model, fit_config, read_config
from lrcompress.training.self_guided import Guidance
from lrcompress.workflows.scaling.point import DENSE, label

# keys that hold for all models of a ladder, or that the ladder itself sets
SHARED = (
    "source", "data", "tokenizer", "vocab_size", "device", "train_length", "max_steps", "held_out",
    "eval_every", "batch_size", "seed", "patience", "tensorboard", "shard",
)  # fmt: skip
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class LadderModel:
    """One model to train. `flops` are of the whole training; `bare` has its shapes, no weights."""

    size: str
    variant: str
    settings: PretrainSettings
    config: Any
    bare: Any
    length: int
    flops: int

    @property
    def name(self) -> str:
        return label(self.size, self.variant, self.settings.seed)

    @property
    def sequences(self) -> int:
        return self.settings.max_steps * self.settings.batch_size

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def rungs(recipe: ScalingRecipe, tokenizer: Any) -> list[LadderModel]:
    """Every model of the ladder, the cheapest first. InputError where a variant does not fit."""
    found = [rung for size in recipe.scaling.sizes for rung in _of_size(recipe, size, tokenizer)]
    names = [rung.name for rung in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}: rename a folder or a variant")
    return sorted(found, key=lambda rung: rung.flops)


def variant_settings(recipe: ScalingRecipe) -> dict[str, PretrainSettings]:
    """The dense models' settings and those of every variant. InputError names what is refused."""
    base = recipe.pretrain.model_dump() | {
        "keep_ratio": None,
        "self_guided": "off",
        "dense_share": 0.0,
    }
    found = {DENSE: checked(PretrainSettings, base)}
    for name, values in recipe.scaling.variants.items():
        say = partial(_say, name)
        for key in SHARED:
            if key in values:
                raise InputError(f"{say(key)}: it holds for all models; set it in pretrain")
        found[name] = checked(PretrainSettings, base | values, say)
    return found


def _say(variant: str, key: str) -> str:
    return f"scaling.variants.{variant}.{key}"


def _of_size(recipe: ScalingRecipe, size: str, tokenizer: Any) -> Iterator[LadderModel]:
    scaling, asked = recipe.scaling, recipe.scaling.sizes[size]
    config = read_config(size)
    variants = {name: _at_size(s, recipe, size) for name, s in variant_settings(recipe).items()}
    fit_config(config, tokenizer, variants[DENSE])
    bare = {name: bare_model(copy.deepcopy(config), s) for name, s in variants.items()}
    first: dict[str, LadderModel] = {}
    # those that are held to another's FLOPs come after it
    for name in sorted(variants, key=lambda name: name in scaling.equal_flops):
        counted = bare[DENSE if scaling.counted == "dense" else name]
        tokens = scaling.tokens_per_parameter * non_embedding(counted)
        limit = first.get(scaling.equal_flops.get(name, ""))
        for seed in range(asked.seeds):
            settings = variants[name].model_copy(update={"seed": seed})
            rung = _rung(size, name, settings, config, bare[name], tokens, limit, scaling)
            first.setdefault(name, rung)
            yield rung


def _at_size(settings: PretrainSettings, recipe: ScalingRecipe, size: str) -> PretrainSettings:
    rate = recipe.scaling.sizes[size].learning_rate
    own = {"source": size} | ({} if rate is None else {"learning_rate": rate})
    return settings.model_copy(update=own)


def _rung(
    size: str,
    variant: str,
    settings: PretrainSettings,
    config: Any,
    bare: Any,
    tokens: float,
    limit: LadderModel | None,
    scaling: Any,
) -> LadderModel:
    length = _length(bare, settings)
    parts, each = scaling.measurements, settings.batch_size * length
    asked = partial(_with_steps, settings, parts)
    cost = partial(_flops, bare, _dense(config, settings), length)
    rounds = max(1, round(tokens / each / parts))
    while limit is not None and rounds > 1 and cost(asked(rounds)) > limit.flops:
        rounds -= 1
    if limit is not None and cost(asked(rounds)) > limit.flops:
        raise InputError(
            f"{variant} at {size} cannot be held to the FLOPs of {limit.variant} in {parts} steps: "
            "set more tokens_per_parameter, or fewer measurements"
        )
    settings = asked(rounds)
    if settings.dense_share and not 0 < settings.dense_steps < settings.max_steps:
        raise InputError(
            f"dense_share {settings.dense_share:g} of {variant} is no part of {parts} "
            f"measurements: take 1/{parts} or more of the steps, or set more measurements"
        )
    return LadderModel(size, variant, settings, config, bare, length, cost(settings))


def _with_steps(settings: PretrainSettings, parts: int, rounds: int) -> PretrainSettings:
    return settings.model_copy(update={"max_steps": rounds * parts, "eval_every": rounds})


def _dense(config: Any, settings: PretrainSettings) -> Any:
    """The model before a warm start ends; None where there is none."""
    if not settings.dense_share:
        return None
    return bare_model(copy.deepcopy(config), settings.model_copy(update={"keep_ratio": None}))


def _length(bare: Any, settings: PretrainSettings) -> int:
    return sequence_length(bare, settings.train_length or DEFAULT_LENGTH)


def _flops(bare: Any, dense: Any, length: int, settings: PretrainSettings) -> int:
    each, first, guided, cost = settings.batch_size * length, settings.dense_steps, 0, 0
    steps = settings.max_steps - first
    warm = flops.run_flops(dense, length, each, first) if first else 0
    if settings.self_guided != "off":
        guided = Guidance(steps, settings.self_guided == "reduced", settings.seed).guided_steps
        cost = guide_flops(bare)
    return warm + flops.run_flops(bare, length, each, steps, cost, guided)


def guide_flops(bare: Any) -> int:
    """Forward FLOPs for a token of the dense layers that guide the low-rank ones."""
    return sum(flops.linear_flops(layer) for _, layer in compressed_layers(bare))


def non_embedding(model: Any) -> int:
    return parameter_count(model) - embedding_count(model)
