"""Trains a ladder of models from scratch on one text, and fits each variant's scaling law.

Every trained model is a point, stored in a file; the same call resumes with the missing ones.
Points from several machines are merged by copying their files into one folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lrcompress.benchmark import throughput
from lrcompress.config.recipe import ScalingRecipe
from lrcompress.layers.ffn_layouts import ffn_parameters
from lrcompress.layers.model_info import parameter_count
from lrcompress.models.loading import load_tokenizer
from lrcompress.reporting.metric import Metric
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent
from lrcompress.training import new_model, pretrain
from lrcompress.training.loop import Trained, TrainingInputs
from lrcompress.training.trainer import BlockDataset
from lrcompress.workflows.scaling.folder import ScalingFolder
from lrcompress.workflows.scaling.ladder import (
    LadderModel,
    ladder_models,
    non_embedding,
    variant_settings,
)
from lrcompress.workflows.scaling.point import DENSE, ScalingPoint, Shard
from lrcompress.workflows.scaling.text import ScalingText, scaling_text


def scaling(
    recipe: ScalingRecipe,
    out: Path,
    progress: Progress = silent,
    shard: tuple[int, int] = (1, 1),
) -> list[ScalingPoint]:
    """Trains every model of `recipe`, writes the report to `out`, and returns the points.

    Models that `out` already has from the same inputs are not trained again. With `shard` (i, n)
    every n-th model is trained, starting at the i-th. Raises InputError where `out` holds
    something else, where a variant or text does not fit, and where a test text is trained on.
    """
    return ScalingStudy(recipe, out, progress, Shard(*shard)).all()


class ScalingStudy:
    """One recipe's models over one folder."""

    def __init__(self, recipe: ScalingRecipe, out: Path, progress: Progress, shard: Shard) -> None:
        self.recipe, self.progress, self.shard = recipe, progress, shard
        self.folder = ScalingFolder(recipe, out)

    def all(self) -> list[ScalingPoint]:
        """Trains the missing models of the shard; returns every point that the folder then has."""
        if not self.recipe.pretrain.data:
            raise InputError("scaling needs text to train on: set pretrain.data")
        variant_settings(self.recipe)  # raises InputError for a variant that does not fit
        self.folder.claim()
        for _, same_size in groupby(self.shard.of(self._models), lambda model: model.size):
            for model in same_size:
                self.folder.point(model.name, self._inputs(model), partial(self._train, model))
            self._report()
        if self.shard.number == 1:
            self.folder.speeds(self._speed_inputs(), self._measure_speeds)
        return self._report()

    def _report(self) -> list[ScalingPoint]:
        """Writes the report of all points that the folder has, those of other shards too."""
        inputs = {model.name: self._inputs(model) for model in self._models}
        return self.folder.write(inputs, self._speed_inputs())

    @cached_property
    def _tokenizer(self) -> Any:
        """Stored in the folder, so that all points and shards use the same one."""
        folder = self.folder.tokenizer
        if not folder.is_dir():
            self.folder.save_tokenizer(new_model.make_tokenizer(self.recipe.pretrain))
        return load_tokenizer(str(folder), None, False)

    @cached_property
    def _models(self) -> list[LadderModel]:
        return ladder_models(self.recipe, self._tokenizer)

    @cached_property
    def _text(self) -> ScalingText:
        length = self._models[0].length
        return scaling_text(self.recipe, self._tokenizer, self._longest_training, length)

    @property
    def _longest_training(self) -> int:
        """Sequences of the longest training: the order of the text depends on it."""
        return max(model.sequences for model in self._models)

    def _inputs(self, model: LadderModel) -> list[Any]:
        """Everything that the model's point depends on."""
        settings = model.settings.model_dump(mode="json", exclude={"tensorboard", "device"})
        scaling = self.recipe.scaling
        text = [scaling.test, scaling.test_sequences, model.length, self._longest_training]
        return [settings, model.config.to_dict(), text, self.folder.text_state()]

    def _train(self, model: LadderModel, checkpoints: Path) -> ScalingPoint:
        text = self._text
        new = new_model.new_model(copy.deepcopy(model.config), model.settings)
        inputs = TrainingInputs(
            BlockDataset(text.training[: model.sequences]),
            BlockDataset(text.test),
            checkpoints,
            self._progress_of(model.name),
        )
        trained = pretrain.train(new, model.settings, inputs)
        return _point(model, new.model, trained)

    def _progress_of(self, name: str) -> Progress:
        """A `Progress` whose descriptions end with the model's name."""

        def progress(items: Any, description: str, total: int | None = None) -> Any:
            return self.progress(items, f"{description} {name}", total)

        return progress

    def _speed_inputs(self) -> list[Any]:
        """Everything that the training speeds depend on."""
        inputs = [self._inputs(model) for model in self._largest.values()]
        return [*inputs, self.recipe.scaling.speed_repeats]

    @cached_property
    def _largest(self) -> Mapping[str, LadderModel]:
        """Variant -> its model of the largest size with the lowest seed.

        Without guided variants and warm starts: they end as plain variants, and are as fast.
        """
        size = self._models[-1].size
        plain = [
            model
            for model in self._models
            if model.size == size
            and model.settings.self_guided == "off"
            and not model.settings.dense_share
        ]
        by_descending_seed = sorted(plain, key=lambda model: -model.settings.seed)
        return {model.variant: model for model in by_descending_seed}

    def _measure_speeds(self) -> list[Metric]:
        """Tokens/s of a training step, and of one FFN in it, at the largest size.

        The models are measured in alternation, the dense model first.
        """
        repeats, batch_size = self.recipe.scaling.speed_repeats, self.recipe.pretrain.batch_size
        if not repeats:
            return []
        dense_first = sorted(self._largest.items(), key=lambda item: item[0] != DENSE)
        models = {
            variant: new_model.new_model(copy.deepcopy(model.config), model.settings).model
            for variant, model in dense_first
        }
        length = self._models[-1].length
        return [
            *throughput.training_throughput(models, batch_size, length, repeats, self.progress),
            *throughput.ffn_training_throughput(models, batch_size, length, repeats, self.progress),
        ]


def _point(spec: LadderModel, model: Any, trained: Trained) -> ScalingPoint:
    rate = trained.tokens_per_second
    return ScalingPoint(
        size=spec.size,
        variant=spec.variant,
        seed=spec.settings.seed,
        parameters=parameter_count(model),
        non_embedding=non_embedding(model),
        ffn_parameters=ffn_parameters(model),
        steps=trained.steps,
        tokens=trained.tokens,
        flops=spec.flops,
        seconds=trained.tokens / rate if rate else trained.seconds,
        loss=trained.after,
        curve=trained.losses,
        device=f"{model.device.type}, {torch.get_num_threads()} threads",
        diverged=trained.diverged,
    )
