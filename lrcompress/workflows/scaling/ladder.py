"""The ladder of a scaling recipe: which models are trained, and for how many steps each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from lrcompress.benchmark import flops
from lrcompress.config import PretrainSettings
from lrcompress.config.recipe import ScalingRecipe, checked
from lrcompress.data.training_text import DEFAULT_TRAIN_LENGTH
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import embedding_count, parameter_count, sequence_length
from lrcompress.runtime.errors import InputError
from lrcompress.training.new_model import bare_model, fit_config, read_config
from lrcompress.training.self_guided import Guidance
from lrcompress.workflows.scaling.point import DENSE, label

# keys of pretrain that a variant cannot set: they are equal for all models of a ladder, or the
# ladder sets them
SHARED_KEYS = (
    "source", "data", "tokenizer", "vocab_size", "device", "train_length", "max_steps", "minutes",
    "held_out", "eval_every", "batch_size", "seed", "patience", "tensorboard", "shard",
)  # fmt: skip


@dataclass(frozen=True)
class LadderModel:
    """One model to train.

    `meta_model` has its shapes and ranks on the meta device, without weights. `length` is the
    number of tokens in a sequence, and `flops` are those of the whole training.
    """

    size: str
    variant: str
    settings: PretrainSettings
    config: Any
    meta_model: Any
    length: int
    flops: int

    @property
    def name(self) -> str:
        """The name of the model's point, in reports and files."""
        return label(self.size, self.variant, self.settings.seed)

    @property
    def sequences(self) -> int:
        """Sequences that the training reads."""
        return self.settings.step_limit * self.settings.batch_size


def ladder_models(recipe: ScalingRecipe, tokenizer: Any) -> list[LadderModel]:
    """Every model of the ladder, the one with the fewest training FLOPs first.

    Raises InputError where a variant does not fit, or where two models have one name.
    """
    models = [
        model for size in recipe.scaling.sizes for model in _models_of_size(recipe, size, tokenizer)
    ]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}: rename a folder or a variant")
    return sorted(models, key=lambda model: model.flops)


def variant_settings(recipe: ScalingRecipe) -> dict[str, PretrainSettings]:
    """Variant -> its settings, the dense models' first. InputError names a refused key."""
    dense = recipe.pretrain.model_dump() | {
        "keep_ratio": None,
        "self_guided": "off",
        "dense_share": 0.0,
    }
    settings = {DENSE: checked(PretrainSettings, dense)}
    for name, values in recipe.scaling.variants.items():
        key_path = partial(_key_path, name)
        for key in SHARED_KEYS:
            if key in values:
                raise InputError(f"{key_path(key)}: it holds for all models; set it in pretrain")
        settings[name] = checked(PretrainSettings, dense | values, key_path)
    return settings


def _key_path(variant: str, key: str) -> str:
    """The recipe key of a variant's setting, for error messages."""
    return f"scaling.variants.{variant}.{key}"


def _models_of_size(recipe: ScalingRecipe, size: str, tokenizer: Any) -> Iterator[LadderModel]:
    scaling = recipe.scaling
    config = read_config(size)
    settings = {name: _at_size(s, recipe, size) for name, s in variant_settings(recipe).items()}
    fit_config(config, tokenizer, settings[DENSE])
    variants = {
        name: SizedVariant(name, variant, config, scaling.measurements)
        for name, variant in settings.items()
    }
    first_seeds: dict[str, LadderModel] = {}
    # a variant that may not exceed another's FLOPs comes after that other one
    for name in sorted(variants, key=lambda name: name in scaling.equal_flops):
        counted = variants[DENSE if scaling.counted == "dense" else name]
        tokens = scaling.tokens_per_parameter * non_embedding(counted.meta_model)
        limit = first_seeds.get(scaling.equal_flops.get(name, ""))
        for seed in range(scaling.sizes[size].seeds):
            model = variants[name].ladder_model(seed, tokens, limit)
            first_seeds.setdefault(name, model)
            yield model


def _at_size(settings: PretrainSettings, recipe: ScalingRecipe, size: str) -> PretrainSettings:
    learning_rate = recipe.scaling.sizes[size].learning_rate
    update = {"source": size} | ({} if learning_rate is None else {"learning_rate": learning_rate})
    return settings.model_copy(update=update)


@dataclass(frozen=True)
class SizedVariant:
    """One variant at one size; finds its steps from a number of tokens or another model's FLOPs.

    A training has `measurements` of its loss at equal intervals, the last one after its last step.
    """

    name: str
    settings: PretrainSettings
    config: Any
    measurements: int

    @cached_property
    def meta_model(self) -> Any:
        """Its shapes and ranks on the meta device, without weights."""
        return bare_model(copy.deepcopy(self.config), self.settings)

    @cached_property
    def _dense_meta_model(self) -> Any:
        """The model before a warm start ends."""
        dense = self.settings.model_copy(update={"keep_ratio": None})
        return bare_model(copy.deepcopy(self.config), dense)

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return sequence_length(self.meta_model, self.settings.train_length or DEFAULT_TRAIN_LENGTH)

    def ladder_model(self, seed: int, tokens: float, limit: LadderModel | None) -> LadderModel:
        """The model that trains on about `tokens`, but with no more FLOPs than `limit`, if given.

        Raises InputError where the FLOPs of `limit` are too few, or a warm start does not fit.
        """
        settings = self.settings.model_copy(update={"seed": seed})
        tokens_per_step = settings.batch_size * self.length
        interval = max(1, round(tokens / tokens_per_step / self.measurements))
        if limit is not None:
            interval = self._interval_within(limit, settings, interval)
        settings = self._with_interval(settings, interval)
        self._check_warm_start(settings)
        return LadderModel(
            size=settings.source,
            variant=self.name,
            settings=settings,
            config=self.config,
            meta_model=self.meta_model,
            length=self.length,
            flops=self._flops(settings),
        )

    def _with_interval(self, settings: PretrainSettings, interval: int) -> PretrainSettings:
        """`settings` with `interval` steps before each measurement."""
        steps = interval * self.measurements
        return settings.model_copy(update={"max_steps": steps, "eval_every": interval})

    def _interval_within(
        self, limit: LadderModel, settings: PretrainSettings, interval: int
    ) -> int:
        """The largest interval up to `interval` whose training has no more FLOPs than `limit`."""
        for shorter in range(interval, 0, -1):
            if self._flops(self._with_interval(settings, shorter)) <= limit.flops:
                return shorter
        raise InputError(
            f"{self.name} at {settings.source} needs more FLOPs than {limit.variant} even in "
            f"{self.measurements} steps: set more tokens_per_parameter, or fewer measurements"
        )

    def _check_warm_start(self, settings: PretrainSettings) -> None:
        if settings.dense_share and not 0 < settings.dense_steps < settings.step_limit:
            raise InputError(
                f"dense_share {settings.dense_share:g} of {self.name} covers none or all of the "
                f"{self.measurements} measurements: set it to 1/{self.measurements} or more and "
                "below 1, or set more measurements"
            )

    def _flops(self, settings: PretrainSettings) -> int:
        """Of the whole training: the warm start, the low-rank model, and its dense guides."""
        tokens_per_step = settings.batch_size * self.length
        warm_steps = settings.dense_steps
        steps = settings.step_limit - warm_steps
        warm_start = guides = guided_steps = 0
        if warm_steps:
            dense = self._dense_meta_model
            warm_start = flops.run_flops(dense, self.length, tokens_per_step, warm_steps)
        if settings.self_guided != "off":
            reduced = settings.self_guided == "reduced"
            guided_steps = Guidance(steps, reduced, settings.seed).guided_steps
            guides = guide_flops(self.meta_model)
        return warm_start + flops.run_flops(
            self.meta_model, self.length, tokens_per_step, steps, guides, guided_steps
        )


def guide_flops(model: Any) -> int:
    """Forward FLOPs per token of the dense layers that guide the low-rank layers of `model`."""
    return sum(flops.linear_flops(layer) for _, layer in compressed_layers(model))


def non_embedding(model: Any) -> int:
    """Parameters outside of the embeddings and the output layer."""
    return parameter_count(model) - embedding_count(model)
