"""Trains a new model on text, dense or with low-rank FFNs from the first step, and saves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.config import ModelSettings, PretrainSettings
from lrcompress.data.training_text import TrainingText
from lrcompress.layers.ffn_layouts import has_experts
from lrcompress.models.loading import Loaded, load_model
from lrcompress.runtime import distributed
from lrcompress.runtime.atomic_io import discard
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent
from lrcompress.training import fsdp
from lrcompress.training.job import TrainingJob, check_device, check_settings
from lrcompress.training.loop import Trained, run
from lrcompress.training.new_model import (
    NewModel,
    bare_model,
    fit_config,
    make_tokenizer,
    new_model,
    read_config,
)
from lrcompress.training.self_guided import Guidance
from lrcompress.training.trainer import BlockDataset, TextTrainer


def pretrain_to(
    settings: PretrainSettings, out: Path, progress: Progress = silent, *, resume: bool = True
) -> dict[str, Any]:
    """Trains a new model and saves it to `out`; returns what lrcompress.json holds.

    Resumes and runs under torchrun as `finetune_to` does. Raises InputError if `out` exists, where
    config, tokenizer or text do not fit, and where training diverged; the best weights before
    that are saved.
    """
    with distributed.process_group(settings.device):
        shown = progress if distributed.is_main() else silent
        return Pretraining(settings, shown).whole(out, resume, replace=False)


class Pretraining(TrainingJob):
    """Of a new model."""

    command = "pretrain"
    stage = "pretrain"
    record_key = "pretrained"
    settings: PretrainSettings

    def __init__(self, settings: PretrainSettings, progress: Progress) -> None:
        super().__init__(settings, progress)
        self.config: Any = None
        self.new: NewModel | None = None

    def checked(self) -> dict[str, Any]:
        settings = self.settings
        check_settings(settings, settings.device, self.command)
        check_device(settings.device, self.command)
        self.config = read_config(settings.source)
        if settings.shard and has_experts(bare_model(self.config, settings)):
            raise InputError("--shard does not split mixtures of experts: leave it out")
        return {"trained_from": settings.source}

    def loaded(self, work: Path) -> Loaded:
        tokenizer = run_on_main(lambda: make_tokenizer(self.settings))
        fit_config(self.config, tokenizer, self.settings)
        if self.settings.shard:
            self.new = self._split(work / "start")
        else:
            self.new = new_model(self.config, self.settings, self.progress)
        return self.new.model, tokenizer

    def _split(self, start: Path) -> NewModel:
        """The main process alone makes the whole model, and each then reads its part of it."""
        bare = bare_model(self.config, self.settings)
        fsdp.check_embedding(bare, "an untied one, or another --vocab-size")
        described = run_on_main(lambda: self._saved(start))
        source = ModelSettings(source=str(start), device=self.settings.device)
        model, _ = run_on_all(lambda: load_model(source, **fsdp.placement(source, shard=True)))
        run_on_main(lambda: discard(start, start.parent))
        return NewModel(model, described=described)

    def _saved(self, start: Path) -> dict[str, Any]:
        on_cpu = self.settings.model_copy(update={"device": "cpu"})  # a GPU may not hold it
        new = new_model(self.config, on_cpu, self.progress)
        save_checkpoint(new.model, None, start, new.described, replace=True)
        return new.described

    def trained(self, model: Any, text: TrainingText, run: Path) -> Trained:
        assert self.new is not None
        held = self.settings.held_out
        data = BlockDataset(text.tokens[held:]), BlockDataset(text.tokens[:held])
        return train(self.new, *data, self.settings, run, self.progress)

    def inputs(self) -> list[Any]:
        asked = self.settings.model_dump(mode="json", exclude={"tensorboard"})
        return [self.config.to_dict(), fingerprints.folder_state(self.settings.tokenizer), asked]

    def described(self) -> dict[str, Any]:
        return {} if self.new is None else self.new.described


def train(
    new: NewModel,
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: PretrainSettings,
    work: Path,
    progress: Progress = silent,
) -> Trained:
    """Trains every parameter of the new model in place; the best measurement's stay.

    With self-guidance the dense layers train beside the low-rank ones, and go at the end. With a
    warm start the model trains dense first, by a schedule of its own, and is then factorized.
    """
    steps = settings.dense_steps
    if not steps:
        return _trained(new, blocks, held_out, settings, work, progress)
    read = steps * settings.batch_size
    alone = {"max_steps": steps, "keep_ratio": None, "self_guided": "off"}
    dense = settings.model_copy(update=alone)
    first = _trained(new, blocks.part(0, read), held_out, dense, work / "dense", progress)
    if first.diverged:
        return first
    new.factorize(settings, progress)
    rest = settings.model_copy(update={"max_steps": settings.max_steps - steps})
    second = _trained(new, blocks.part(read), held_out, rest, work / "low-rank", progress)
    return first.then(second)


def _trained(
    new: NewModel,
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: PretrainSettings,
    work: Path,
    progress: Progress,
) -> Trained:
    guidance = Guidance(settings.max_steps, settings.self_guided == "reduced", settings.seed)
    prepared = _guided(new, settings, guidance)
    return run(
        new.model,
        prepared,
        TextTrainer,
        blocks,
        held_out,
        settings,
        work,
        progress,
        callbacks=[guidance],
    )


@contextmanager
def _guided(new: NewModel, settings: PretrainSettings, guidance: Guidance) -> Iterator[Any]:
    with ExitStack() as stack:
        if settings.self_guided != "off":
            stack.enter_context(guidance.guiding(new.pairs, training=True))
        yield new.model
