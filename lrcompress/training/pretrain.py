"""Pretraining: trains a new model on text, dense or with low-rank FFNs, and saves it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
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
from lrcompress.training.job import TrainingJob, check_device, check_training_settings
from lrcompress.training.loop import Trained, TrainingInputs, TrainingLoop
from lrcompress.training.new_model import (
    NewModel,
    bare_model,
    fit_config,
    make_tokenizer,
    new_model,
    read_config,
)
from lrcompress.training.self_guided import Guidance
from lrcompress.training.trainer import TextTrainer


def pretrain_to(
    settings: PretrainSettings, out: Path, progress: Progress = silent, *, resume: bool = True
) -> dict[str, Any]:
    """Trains a new model and saves it to `out`; returns the content of lrcompress.json.

    Resumes and runs under torchrun as `finetune_to` does. Raises InputError if `out` exists, where
    the config, the tokenizer or the text do not fit, and where training diverged; in that last case
    the best weights before it are saved.
    """
    with distributed.process_group(settings.device):
        shown = progress if distributed.is_main() else silent
        return PretrainJob(settings, shown).run(out, resume, replace=False)


class PretrainJob(TrainingJob):
    """Trains a new model from scratch."""

    command = "pretrain"
    stage = "pretrain"
    record_key = "pretrained"
    settings: PretrainSettings

    def __init__(self, settings: PretrainSettings, progress: Progress) -> None:
        super().__init__(settings, progress)
        self.config: Any = None
        self.new: NewModel | None = None

    def check_inputs(self) -> dict[str, Any]:
        settings = self.settings
        check_training_settings(settings, settings.device, self.command)
        check_device(settings.device, self.command)
        self.config = read_config(settings.source)
        if settings.shard and has_experts(bare_model(self.config, settings)):
            raise InputError("--shard does not split mixtures of experts: leave it out")
        return {"trained_from": settings.source}

    def load(self, work: Path) -> Loaded:
        tokenizer = run_on_main(lambda: make_tokenizer(self.settings))
        fit_config(self.config, tokenizer, self.settings)
        if self.settings.shard:
            self.new = self._load_sharded(work / "start")
        else:
            self.new = new_model(self.config, self.settings, self.progress)
        return self.new.model, tokenizer

    def _load_sharded(self, folder: Path) -> NewModel:
        """The main process saves the whole model to `folder`; each then loads its shard of it."""
        bare = bare_model(self.config, self.settings)
        fsdp.check_embedding(bare, "an untied one, or another --vocab-size")
        record = run_on_main(lambda: self._save_start(folder))
        source = ModelSettings(source=str(folder), device=self.settings.device)
        model, _ = run_on_all(lambda: load_model(source, **fsdp.placement(source, shard=True)))
        run_on_main(lambda: discard(folder, folder.parent))
        return NewModel(model, record=record)

    def _save_start(self, folder: Path) -> dict[str, Any]:
        on_cpu = self.settings.model_copy(update={"device": "cpu"})  # a GPU may be too small
        new = new_model(self.config, on_cpu, self.progress)
        save_checkpoint(new.model, None, folder, new.record, replace=True)
        return new.record

    def train(self, model: Any, text: TrainingText, checkpoints: Path) -> Trained:
        assert self.new is not None, "load comes first"
        return train(self.new, self.settings, self.training_inputs(text, checkpoints))

    def fingerprint_inputs(self) -> list[Any]:
        settings = self.settings.model_dump(mode="json", exclude={"tensorboard"})
        return [self.config.to_dict(), fingerprints.folder_state(self.settings.tokenizer), settings]

    def model_record(self) -> dict[str, Any]:
        return {} if self.new is None else self.new.record


def train(new: NewModel, settings: PretrainSettings, inputs: TrainingInputs) -> Trained:
    """Trains all parameters of a new model in place; it ends with the weights of the best step.

    In self-guided training the dense layers train beside the low-rank ones, and are removed at the
    end. With a warm start the model trains dense for its first steps, with a learning rate schedule
    of its own, and is then factorized.
    """
    steps = settings.dense_steps
    if not steps:
        return _train_phase(new, settings, inputs)
    sequences = steps * settings.batch_size
    blocks, checkpoints = inputs.blocks, inputs.checkpoints
    dense_phase = _train_phase(
        new,
        settings.model_copy(update={"max_steps": steps, "keep_ratio": None, "self_guided": "off"}),
        replace(inputs, blocks=blocks.part(0, sequences), checkpoints=checkpoints / "dense"),
    )
    if dense_phase.diverged:
        return dense_phase
    new.factorize(settings, inputs.progress)
    low_rank_phase = _train_phase(
        new,
        settings.model_copy(update={"max_steps": settings.step_limit - steps}),
        replace(inputs, blocks=blocks.part(sequences), checkpoints=checkpoints / "low-rank"),
    )
    return dense_phase.followed_by(low_rank_phase)


def _train_phase(new: NewModel, settings: PretrainSettings, inputs: TrainingInputs) -> Trained:
    guidance = Guidance(settings.step_limit, settings.self_guided == "reduced", settings.seed)
    loop = TrainingLoop(new.model, settings, inputs, callbacks=[guidance])
    guiding = settings.self_guided != "off"
    with guidance.guiding(new.guide_pairs, train_guides=True) if guiding else nullcontext():
        loop.run(new.model, TextTrainer)
    return loop.result()
