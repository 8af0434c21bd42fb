"""A ladder of models trained from scratch on one text: which law does each variant's loss follow?

Every model is a point, and a file once it is trained; the same call goes on with those that are
missing. Points of several machines are put together by copying their files into one folder.
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
from lrcompress.workflows.scaling.ladder import LadderModel, non_embedding, rungs, variant_settings
from lrcompress.workflows.scaling.point import DENSE, ScalingPoint, Shard
from lrcompress.workflows.scaling.text import ScalingText, scaling_text


def scaling(
    recipe: ScalingRecipe,
    out: Path,
    progress: Progress = silent,
    shard: tuple[int, int] = (1, 1),
) -> list[ScalingPoint]:
    """Trains every model of `recipe` and writes the report to `out`; returns its points.

    Models that `out` already holds, trained from the same inputs, are not trained again. With a
    `shard` (i, n) every n-th of the models is trained, from the i-th. Raises InputError where `out`
    is something else, where a variant or text does not fit, and where a test text is trained on.
    """
    return Scaling(recipe, out, progress, Shard(*shard)).all()


class Scaling:
    """One recipe's models over one folder."""

    def __init__(self, recipe: ScalingRecipe, out: Path, progress: Progress, shard: Shard) -> None:
        self.recipe, self.progress, self.shard = recipe, progress, shard
        self.folder = ScalingFolder(recipe, out)

    def all(self) -> list[ScalingPoint]:
        if not self.recipe.pretrain.data:
            raise InputError("scaling needs text to train on: set pretrain.data")
        variant_settings(self.recipe)  # refuses what does not fit
        self.folder.claim()
        for _, same_size in groupby(self.shard.of(self._rungs), lambda rung: rung.size):
            for rung in same_size:
                self.folder.point(rung.name, self._inputs(rung), partial(self._made, rung))
            self._report()
        if self.shard.number == 1:
            self.folder.speeds(self._speed_inputs(), self._speeds)
        return self._report()

    def _report(self) -> list[ScalingPoint]:
        """Of all points that the folder has, those of other shards too."""
        known = {rung.name: self._inputs(rung) for rung in self._rungs}
        return self.folder.write(known, self._speed_inputs())

    @cached_property
    def _tokenizer(self) -> Any:
        """Kept in the folder, so that all points and shards have the same."""
        kept = self.folder.tokenizer
        if not kept.is_dir():
            made = new_model.make_tokenizer(self.recipe.pretrain)
            self.folder.keep_tokenizer(made)
        return load_tokenizer(str(kept), None, False)

    @cached_property
    def _rungs(self) -> list[LadderModel]:
        return rungs(self.recipe, self._tokenizer)

    @cached_property
    def _text(self) -> ScalingText:
        length = self._rungs[0].length
        return scaling_text(self.recipe, self._tokenizer, self._longest, length)

    def _inputs(self, rung: LadderModel) -> list[Any]:
        settings = rung.settings.model_dump(mode="json", exclude={"tensorboard", "device"})
        asked = self.recipe.scaling
        text = [asked.test, asked.test_sequences, rung.length, self._longest]
        return [settings, rung.config.to_dict(), text, self.folder.text_state()]

    @property
    def _longest(self) -> int:
        """Sequences of the longest training: how the text is dealt out depends on it."""
        return max(rung.sequences for rung in self._rungs)

    def _made(self, rung: LadderModel, work: Path) -> ScalingPoint:
        text = self._text
        new = new_model.new_model(copy.deepcopy(rung.config), rung.settings)
        blocks = BlockDataset(text.training[: rung.sequences])
        held_out = BlockDataset(text.test)
        inputs = TrainingInputs(blocks, held_out, work, self._named(rung.name))
        return _point(rung, new.model, pretrain.train(new, rung.settings, inputs))

    def _named(self, name: str) -> Progress:
        """A `Progress` that says which model it is."""

        def named(items: Any, description: str, total: int | None = None) -> Any:
            return self.progress(items, f"{description} {name}", total)

        return named

    def _speed_inputs(self) -> list[Any]:
        return [self._inputs(rung) for rung in self._largest.values()] + [
            self.recipe.scaling.speed_repeats
        ]

    @cached_property
    def _largest(self) -> Mapping[str, LadderModel]:
        """The models of the largest size, by variant; a guided one, or one with a warm start, is as
        fast as its plain one."""
        size = self._rungs[-1].size
        plain = [r for r in self._rungs if r.settings.self_guided == "off"]
        found = [r for r in plain if r.size == size and not r.settings.dense_share]
        return {rung.variant: rung for rung in sorted(found, key=lambda rung: -rung.settings.seed)}

    def _speeds(self) -> list[Metric]:
        """Of a training step, and of one FFN in it, at the largest size, in turn."""
        repeats, settings = self.recipe.scaling.speed_repeats, self.recipe.pretrain
        if not repeats:
            return []
        models = {
            name: new_model.new_model(copy.deepcopy(rung.config), rung.settings).model
            for name, rung in sorted(self._largest.items(), key=lambda one: one[0] != DENSE)
        }
        shape = (settings.batch_size, self._rungs[-1].length, repeats, self.progress)
        steps = throughput.training_throughput(models, *shape)
        return steps + throughput.ffn_training_throughput(models, *shape)


def _point(rung: LadderModel, model: Any, done: Trained) -> ScalingPoint:
    rate = done.tokens_per_second
    return ScalingPoint(
        size=rung.size,
        variant=rung.variant,
        seed=rung.settings.seed,
        parameters=parameter_count(model),
        non_embedding=non_embedding(model),
        ffn_parameters=ffn_parameters(model),
        steps=done.steps,
        tokens=done.tokens,
        flops=rung.flops,
        seconds=done.tokens / rate if rate else done.seconds,
        loss=done.after,
        curve=done.losses,
        device=f"{model.device.type}, {torch.get_num_threads()} threads",
        diverged=done.diverged,
    )
