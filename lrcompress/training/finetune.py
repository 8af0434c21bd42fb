"""Loads a compressed checkpoint, trains it towards its dense teacher, saves the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.record import read_record
from lrcompress.config import FinetuneSettings, ModelSettings
from lrcompress.data.training_text import TrainingText
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import refuse_quantized
from lrcompress.layers.model_state import only_trainable, requires_grad_restored
from lrcompress.layers.moe import unpacked
from lrcompress.models.loading import Loaded, load_model, locate, with_source
from lrcompress.reporting.provenance import provenance_of
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra
from lrcompress.runtime.progress import Progress, silent
from lrcompress.training import fsdp, job
from lrcompress.training.distillation import DistillationTrainer, Objective
from lrcompress.training.fsdp import is_sharded
from lrcompress.training.job import TrainingJob, check_device
from lrcompress.training.loop import Trained, autocast, run
from lrcompress.training.self_guided import Guidance, guides
from lrcompress.training.teacher_cache import TeacherCache
from lrcompress.training.trainable import balance, pack, trainable, with_adapters
from lrcompress.training.trainer import BlockDataset

LoadTeacher = Callable[[ModelSettings], Loaded]


def finetune_to(
    source: ModelSettings,
    settings: FinetuneSettings,
    out: Path,
    progress: Progress = silent,
    *,
    resume: bool = True,
    replace: bool = False,
    load_teacher: LoadTeacher | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same call goes on from the last
    unless `resume` is off. Under torchrun every process calls it, and the main one writes. Raises
    InputError if `out` exists and is not to be replaced, where text, teacher or checkpoint do not
    fit, and where training diverged; the best weights before that are saved.
    """
    with distributed.group(source.device):
        shown = progress if distributed.is_main() else silent
        run = Finetuning(source, settings, shown, load_teacher)
        return run.whole(out, resume, replace)


class Finetuning(TrainingJob):
    """Of a compressed checkpoint, towards its dense teacher."""

    command = "finetune"
    stage = "finetune"
    record_key = "finetuned"
    settings: FinetuneSettings

    def __init__(
        self,
        source: ModelSettings,
        settings: FinetuneSettings,
        progress: Progress,
        load_teacher: LoadTeacher | None,
    ) -> None:
        super().__init__(settings, progress)
        self.source, self.load_teacher = source, load_teacher
        self.dense = source  # the teacher, once the checkpoint's record is read
        self.teacher: Any = None

    def checked(self) -> dict[str, Any]:
        source, settings = self.source, self.settings
        check_settings(settings, source.device)
        record = read_record(Path(locate(source.source).path)) or {}
        name = settings.teacher or record.get("source")
        if name is None:
            raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
        self.dense = with_source(source, name)
        for each in (source, self.dense) if settings.shard else ():
            fsdp.check_source(each)
        check_device(source.device, self.command)
        record.pop("metrics", None)  # they are of the model before training
        if "finetuned" in record:
            record["before"] = provenance_of(record)
        return record

    def loaded(self, work: Path) -> Loaded:
        shard = self.settings.shard
        model, tokenizer = load_model(self.source, **fsdp.placement(self.source, shard))
        refuse_quantized(model, "finetune it before it is quantized")
        fsdp.check_precision(model)
        if shard and self.settings.train == "all":
            fsdp.check_embedding(model, "--train norms")
        if self.load_teacher is not None:
            self.teacher, _ = self.load_teacher(self.dense)
        else:
            place = fsdp.placement(self.dense, shard)
            self.teacher, _ = load_model(self.dense, **place)
        check_pair(model, self.teacher, self.settings.hidden_states > 0)
        return model, tokenizer

    def trained(self, model: Any, text: TrainingText, run: Path) -> Trained:
        settings, held = self.settings, self.settings.held_out
        cache = self._cache(text)
        if cache is not None and settings.self_guided == "off":
            self.teacher = None  # all that it says is kept, and its memory is needed
        return train_student(
            model,
            self.teacher,
            BlockDataset(text.tokens[held:], cache, held),
            BlockDataset(text.tokens[:held], cache),
            settings,
            run,
            self.progress,
        )

    def inputs(self) -> list[Any]:
        asked = self.settings.model_dump(mode="json", exclude={"tensorboard", "teacher_cache"})
        cached = self.settings.teacher_cache is not None  # its loss is another one, wherever it is
        return [fingerprints.model_inputs(self.source), asked, cached]

    def _cache(self, text: TrainingText) -> TeacherCache | None:
        """The teacher's predictions for all sequences, if they are kept; made where missing."""
        settings = self.settings
        if settings.teacher_cache is None:
            return None
        kept = (settings.teacher_top_k, settings.temperature, autocast(self.teacher, settings))
        inputs = [fingerprints.model_inputs(self.dense), text.mark["sha256"], kept]
        folder = Path(settings.teacher_cache) / fingerprints.digest(inputs, "teacher")[:16]
        cache = TeacherCache(folder, *kept)
        missing = run_on_main(lambda: cache.missing(len(text.tokens)))
        own = distributed.shard_of(missing)
        run_on_all(lambda: cache.fill(self.teacher, text.tokens, own, self.progress))
        return cache


def check_settings(settings: FinetuneSettings, device: str) -> None:
    """Raises InputError for what cannot work on this machine, before anything is loaded."""
    job.check_settings(settings, device, Finetuning.command)
    if settings.train == "lora":
        require_extra("peft", "lora")


def train_student(
    model: Any,
    teacher: Any,
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: FinetuneSettings,
    work: Path,
    progress: Progress = silent,
) -> Trained:
    """Trains `model` in place towards `teacher`; the parameters of the best measurement stay.

    Checkpoints are kept in `work`; a run that finds one there goes on from it. `teacher` may be
    None where the sequences bring its predictions. Raises InputError where nothing is gained.
    """
    guidance = Guidance(settings.max_steps, settings.self_guided == "reduced", settings.seed)
    make = partial(DistillationTrainer, teacher=teacher, objective=_objective(settings))
    prepared = _guided(model, teacher, settings, guidance)
    done = run(
        model, prepared, make, blocks, held_out, settings, work, progress, callbacks=[guidance]
    )
    if settings.self_guided == "off":
        return done
    return replace(done, guided_share=guidance.layers / len(list(compressed_layers(model))))


def check_pair(model: Any, teacher: Any, hidden_states: bool) -> None:
    """Raises InputError where nothing is compressed, or where the vocabularies differ; with
    `hidden_states` also where those have another number or width."""
    if not any(compressed_layers(model)):
        raise InputError("nothing in the model is compressed: factorize it first")
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has {sizes[1]} tokens and the model {sizes[0]}: name the dense model "
            "that was compressed as --teacher"
        )
    if not hidden_states:
        return
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (model, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the teacher has blocks and width {shapes[1]} and the model {shapes[0]}: leave "
            "--hidden-states out"
        )


@contextmanager
def _guided(
    model: Any, teacher: Any, settings: FinetuneSettings, guidance: Guidance
) -> Iterator[Any]:
    """`_prepared`, with the teacher's dense layers beside the low-rank ones if asked for."""
    with ExitStack() as stack:
        student = stack.enter_context(_prepared(model, settings))
        if settings.self_guided != "off":
            stack.enter_context(unpacked(teacher))
            pairs = guides(model, dict(teacher.named_modules()))
            stack.enter_context(guidance.guiding(pairs))
        yield student


@contextmanager
def _prepared(model: Any, settings: FinetuneSettings) -> Iterator[Any]:
    """The model as it trains, with what trains of it; afterwards it has its own layers again."""
    precision = model.dtype
    with requires_grad_restored(model):
        stored = balance(model) if settings.balances else {}
        lora = settings.train == "lora"
        student = with_adapters(model, settings.lora_rank, settings.seed) if lora else model
        parameters = list(trainable(student, settings.train))
        with only_trainable(student, parameters):
            # small steps vanish in weights of lower precision; without autocast all that a layer
            # reads has to have one precision
            for parameter in parameters if autocast(model, settings) else student.parameters():
                if parameter.dtype != torch.float32:
                    parameter.data = parameter.data.float()
            yield student
        if lora:
            student.merge_and_unload()
        pack(model, stored)
        if not is_sharded(model):
            model.to(precision)


def _objective(settings: FinetuneSettings) -> Objective:
    return Objective(settings.temperature, settings.cross_entropy, settings.hidden_states)
