"""Finetuning: trains a compressed checkpoint towards its dense teacher and saves the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.record import drop_measured, record_of
from lrcompress.config import FinetuneSettings, ModelSettings
from lrcompress.data.training_text import TrainingText
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import check_predicts_next_token, refuse_quantized
from lrcompress.layers.model_state import only_trainable, requires_grad_restored
from lrcompress.layers.moe import unpacked
from lrcompress.layers.nonfinite import check_weights_finite
from lrcompress.models.loading import Loaded, load_model, with_source
from lrcompress.reporting.provenance import provenance_of
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra
from lrcompress.runtime.progress import Progress, silent
from lrcompress.training import fsdp
from lrcompress.training.distillation import DistillationTrainer, Objective
from lrcompress.training.job import TrainingJob, check_device, check_training_settings
from lrcompress.training.loop import Trained, TrainingInputs, TrainingLoop, uses_autocast
from lrcompress.training.self_guided import Guidance, guide_pairs
from lrcompress.training.teacher_cache import TeacherCache
from lrcompress.training.trainable import balance, pack, trainable, with_adapters

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
    """Trains the checkpoint `source` and saves it to `out`; returns the content of lrcompress.json.

    Training keeps checkpoints beside `out` until `out` is complete. The same call resumes from the
    last of them, unless `resume` is False. Under torchrun every process makes this call, and the
    main process writes. Raises InputError if `out` exists and `replace` is False, where the text,
    the teacher or the checkpoint do not fit, and where training diverged; in that last case the
    best weights before it are saved.
    """
    with distributed.process_group(source.device):
        shown = progress if distributed.is_main() else silent
        return FinetuneJob(source, settings, shown, load_teacher).run(out, resume, replace)


class FinetuneJob(TrainingJob):
    """Trains a compressed checkpoint towards its dense teacher."""

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
        self.teacher_source = source  # set by check_inputs, which reads the name in the record
        self.teacher: Any = None

    def check_inputs(self) -> dict[str, Any]:
        source, settings = self.source, self.settings
        check_settings(settings, source.device)
        record = record_of(source) or {}
        teacher_name = settings.teacher or record.get("source")
        if teacher_name is None:
            raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
        self.teacher_source = with_source(source, teacher_name)
        if settings.shard:
            fsdp.check_source(source)
            fsdp.check_source(self.teacher_source)
        check_device(source.device, self.command)
        drop_measured(record)
        if "finetuned" in record:
            record["before"] = provenance_of(record)
        return record

    def load(self, work: Path) -> Loaded:
        shard = self.settings.shard
        model, tokenizer = load_model(self.source, **fsdp.placement(self.source, shard))
        refuse_quantized(model, "finetune it before it is quantized")
        check_predicts_next_token(model, "finetuning")
        fsdp.check_precision(model)
        if shard and self.settings.train == "all":
            fsdp.check_embedding(model, "--train norms")
        self.teacher = self._load_teacher()
        check_weights_finite("compressed", model)
        check_weights_finite("teacher", self.teacher)
        check_pair(model, self.teacher, self.settings.hidden_states > 0)
        return model, tokenizer

    def _load_teacher(self) -> Any:
        if self.load_teacher is not None:
            return self.load_teacher(self.teacher_source)[0]
        placement = fsdp.placement(self.teacher_source, self.settings.shard)
        return load_model(self.teacher_source, **placement)[0]

    def train(self, model: Any, text: TrainingText, checkpoints: Path) -> Trained:
        cache = self._fill_teacher_cache(text)
        if cache is not None and self.settings.self_guided == "off":
            self.teacher = None  # the cache replaces it; this frees its memory
        inputs = self.training_inputs(text, checkpoints, cache)
        return train_student(model, self.teacher, self.settings, inputs)

    def fingerprint_inputs(self) -> list[Any]:
        settings = self.settings.model_dump(mode="json", exclude={"tensorboard", "teacher_cache"})
        # a cache changes the loss, wherever its folder is
        has_cache = self.settings.teacher_cache is not None
        return [fingerprints.model_inputs(self.source), settings, has_cache]

    def _fill_teacher_cache(self, text: TrainingText) -> TeacherCache | None:
        """Writes the teacher's predictions that the cache lacks; None if the settings name none."""
        settings = self.settings
        if settings.teacher_cache is None:
            return None
        autocast = uses_autocast(self.teacher, settings)
        options = (settings.teacher_top_k, settings.temperature, autocast)
        inputs = [
            fingerprints.model_inputs(self.teacher_source),
            text.fingerprint["sha256"],
            options,
        ]
        folder = Path(settings.teacher_cache) / fingerprints.digest(inputs, "teacher")[:16]
        cache = TeacherCache(
            folder,
            top_k=settings.teacher_top_k,
            temperature=settings.temperature,
            autocast=autocast,
        )
        missing = run_on_main(lambda: cache.missing_chunks(len(text.tokens)))
        chunks = distributed.shard_of(missing)
        run_on_all(lambda: cache.fill(self.teacher, text.tokens, chunks, self.progress))
        return cache


def check_settings(settings: FinetuneSettings, device: str) -> None:
    """Raises InputError for settings that cannot work on this machine; loads no model."""
    check_training_settings(settings, device, FinetuneJob.command)
    if settings.train == "lora":
        require_extra("peft", "lora")


def train_student(
    model: Any, teacher: Any, settings: FinetuneSettings, inputs: TrainingInputs
) -> Trained:
    """Trains `model` in place towards `teacher`; it ends with the weights of the best step.

    Resumes from a checkpoint in `inputs.checkpoints`. `teacher` may be None where a cache gives its
    predictions. Raises InputError where the held-out loss does not improve.
    """
    objective = Objective(
        temperature=settings.temperature,
        cross_entropy=settings.cross_entropy,
        hidden_states=settings.hidden_states,
    )
    make_trainer = partial(DistillationTrainer, teacher=teacher, objective=objective)
    guidance = Guidance(settings.step_limit, settings.self_guided == "reduced", settings.seed)
    loop = TrainingLoop(model, settings, inputs, callbacks=[guidance])
    with _guided_student(model, teacher, settings, guidance) as student:
        loop.run(student, make_trainer)
    trained = loop.result()
    if settings.self_guided == "off":
        return trained
    layer_count = len(list(compressed_layers(model)))
    return replace(trained, guided_share=guidance.guided_layers / layer_count)


def check_pair(model: Any, teacher: Any, hidden_states: bool) -> None:
    """Raises InputError where `model` has no compressed layer, or another vocabulary.

    With `hidden_states` the number of blocks and the width have to be equal too.
    """
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
def _guided_student(
    model: Any, teacher: Any, settings: FinetuneSettings, guidance: Guidance
) -> Iterator[Any]:
    """`_student`; in self-guided training the teacher's dense layers guide the low-rank ones."""
    with ExitStack() as stack:
        student = stack.enter_context(_student(model, settings))
        if settings.self_guided != "off":
            stack.enter_context(unpacked(teacher))
            pairs = guide_pairs(model, dict(teacher.named_modules()))
            stack.enter_context(guidance.guiding(pairs))
        yield student


@contextmanager
def _student(model: Any, settings: FinetuneSettings) -> Iterator[Any]:
    """`model` in the form in which it trains: balanced factors, adapters, float32 parameters.

    Only the parameters that `settings.train` names require a gradient. At the end `model` has its
    stored layers and its precision again, with the trained weights.
    """
    precision = model.dtype
    with requires_grad_restored(model):
        stored = balance(model) if settings.balances else {}
        has_adapters = settings.train == "lora"
        student = model
        if has_adapters:
            student = with_adapters(model, settings.lora_rank, settings.seed)
        parameters = list(trainable(student, settings.train))
        with only_trainable(student, parameters):
            # Small steps would be rounded away in lower precision. Without autocast all the
            # operands of a layer need one precision, so that the frozen parameters change too.
            widened = parameters if uses_autocast(model, settings) else student.parameters()
            for parameter in widened:
                if parameter.dtype != torch.float32:
                    parameter.data = parameter.data.float()
            yield student
        if has_adapters:
            student.merge_and_unload()
        pack(model, stored)
        if not fsdp.is_sharded(model):
            model.to(precision)
