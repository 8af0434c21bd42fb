"""Continued training of a compressed model; an interrupted run goes on from its checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrcompress.distill import (
    BlockDataset,
    DistillationTrainer,
    Objective,
    Watch,
    held_out_losses,
)
from lrcompress.guidance import Guidance
from lrcompress.lowrank import compressed_layers
from lrcompress.parametrization import balance, pack, trainable, with_adapters
from lrcompress.processes import from_main, share
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.settings import FinetuneSettings
from lrcompress.sharding import is_sharded
from lrcompress.steps import Steps, tensorboard

WARM_UP = 0.1
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Recovery:
    """What training did: held-out losses (nats per token) by step, None where not finite.

    The weights of the best step are kept; `after` is their loss as they are saved: merged, packed,
    in the model's own precision.
    `seconds` are of this process, and the rate is of the steps that it took; None if it took none.
    `diverged` is the reason for which training was stopped, if it was.
    """

    steps: int
    tokens: int
    trained_parameters: int
    best_step: int
    before: float
    after: float
    losses: tuple[tuple[int, float | None], ...]
    seconds: float
    tokens_per_second: float | None
    diverged: str | None = None


def train(
    model: Any,
    teacher: Any,
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: FinetuneSettings,
    work: Path,
    progress: Progress = silent,
) -> Recovery:
    """Trains `model` in place towards `teacher`; the parameters of the best measurement stay.

    Checkpoints are kept in `work`; a run that finds one there goes on from it. `teacher` may be
    None where the sequences bring its predictions. Raises InputError where nothing is gained.
    """
    started, found = time.perf_counter(), from_main(lambda: last_checkpoint(work))
    watch = Watch(settings.patience)
    each = settings.batch_size * blocks.blocks.shape[1]
    steps = Steps(progress, settings.max_steps, each)
    guidance = Guidance(settings.max_steps, settings.self_guided == "reduced", settings.seed)
    with ExitStack() as stack:
        student, parameters = stack.enter_context(_prepared(model, settings))
        if settings.self_guided != "off":
            stack.enter_context(guidance.guiding(model, teacher))
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            objective=_objective(settings),
            args=_arguments(settings, work, model, found is None),
            train_dataset=blocks,
            eval_dataset=held_out,
            callbacks=[watch, steps, guidance, *tensorboard(settings.tensorboard)],
        )
        _run(trainer, watch, found)
        count = sum(parameter.numel() for parameter in parameters)
    after = trainer.loss_of(model)
    return _recovery(trainer, watch, count, each, after, steps, time.perf_counter() - started)


def _run(trainer: DistillationTrainer, watch: Watch, found: str | None) -> None:
    """Trains from the checkpoint `found`, unless it is of a run that had ended."""
    if found is not None:
        state = TrainerState.load_from_json(str(Path(found) / STATE))
        if watch.has_ended(state):
            trainer.restore(state)
            return
    trainer.train(resume_from_checkpoint=found)


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
def _prepared(model: Any, settings: FinetuneSettings) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    """The model as it trains and what trains of it; afterwards it has its own layers again."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    precision = model.dtype
    stored = balance(model) if settings.balances else {}
    lora = settings.train == "lora"
    student = with_adapters(model, settings.lora_rank, settings.seed) if lora else model
    parameters = list(trainable(student, settings.train))
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    # steps as small as the rate asks for vanish in weights of lower precision; without autocast
    # all that a layer is given has to have one precision
    for parameter in parameters if _autocast(model, settings) else student.parameters():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    yield student, parameters
    if lora:
        student.merge_and_unload()
    pack(model, stored)
    if not is_sharded(model):
        model.to(precision)
    for parameter, was in wanted:
        parameter.requires_grad_(was)


def _autocast(model: Any, settings: FinetuneSettings) -> bool:
    """Whether products are in bfloat16."""
    on_cuda = model.device.type == "cuda"
    return settings.precision == "bfloat16" or (settings.precision == "auto" and on_cuda)


def _objective(settings: FinetuneSettings) -> Objective:
    return Objective(settings.temperature, settings.cross_entropy, settings.hidden_states)


def _arguments(
    settings: FinetuneSettings, work: Path, model: Any, from_start: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.max_steps,
        per_device_train_batch_size=share(settings.batch_size, settings.gradient_accumulation),
        per_device_eval_batch_size=1,  # Trainer weighs batches alike, whatever they hold
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * settings.max_steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=from_start,  # a run that goes on has measured there already
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(10, settings.eval_every),
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        bf16=_autocast(model, settings),
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        use_cache=getattr(model.config, "use_cache", True),  # Trainer writes it into the config
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer copies the model to every GPU
    return arguments


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole: its state is written last."""
    found = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if _whole(folder / STATE)
    ]
    return str(max(found)[1]) if found else None


def _whole(state: Path) -> bool:
    try:
        json.loads(state.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _recovery(
    trainer: DistillationTrainer,
    watch: Watch,
    count: int,
    each: int,
    after: float,
    steps: Steps,
    seconds: float,
) -> Recovery:
    """Raises InputError where what is left is not better than what there was."""
    state = trainer.state
    losses = tuple((s, x if math.isfinite(x) else None) for s, x in held_out_losses(state))
    before = losses[0][1]
    best = state.best_global_step  # None where no measurement but the first was finite
    if best is None or before is None or not after < before:
        why = f"diverged: {watch.diverged}" if watch.diverged else "gained nothing on held-out text"
        raise InputError(
            f"training {why} (loss {before} before it, {after:.4g} after): use a smaller "
            "--learning-rate"
        )
    return Recovery(
        steps=state.global_step,
        tokens=state.global_step * each,
        trained_parameters=count,
        best_step=best,
        before=before,
        after=after,
        losses=losses,
        seconds=seconds,
        tokens_per_second=steps.tokens_per_second or None,
        diverged=watch.diverged,
    )
