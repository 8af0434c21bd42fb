"""Continued training of a compressed model; an interrupted run goes on from its checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrcompress.distill import BlockDataset, DistillationTrainer, Watch, refuse_divergence
from lrcompress.lowrank import compressed_layers
from lrcompress.processes import from_main, share
from lrcompress.protocols import InputError, Progress, silent
from lrcompress.settings import FinetuneSettings

WARM_UP = 0.1
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Recovery:
    """What training did: held-out losses (nats per token) by step, the best one is kept."""

    steps: int
    tokens: int
    trained_parameters: int
    best_step: int
    before: float
    best: float
    losses: tuple[tuple[int, float], ...]
    seconds: float


def train(
    model: Any,
    teacher: Any,
    tokens: Tensor,
    held_out: Tensor,
    settings: FinetuneSettings,
    work: Path,
    progress: Progress = silent,
) -> Recovery:
    """Trains `model` in place towards `teacher`; the parameters of the best measurement stay.

    `tokens` and `held_out` are (sequences, length). Checkpoints are kept in `work`; a run that
    finds one there goes on from it. Raises InputError where training diverges.
    """
    started = time.perf_counter()
    parameters = list(_trainable(model, settings.train))
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    watch = Watch()
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        temperature=settings.temperature,
        cross_entropy=settings.cross_entropy,
        args=_arguments(settings, work, model),
        train_dataset=BlockDataset(tokens),
        eval_dataset=BlockDataset(held_out),
        callbacks=[watch, Steps(progress, settings.max_steps)],
    )
    try:
        trainer.train(resume_from_checkpoint=from_main(lambda: last_checkpoint(work)))
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)
    refuse_divergence(watch)
    return _recovery(trainer, parameters, tokens, settings, time.perf_counter() - started)


def check_pair(model: Any, teacher: Any) -> None:
    """Raises InputError where nothing is compressed, or where the vocabularies differ."""
    if not any(compressed_layers(model)):
        raise InputError("nothing in the model is compressed: factorize it first")
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has {sizes[1]} tokens and the model {sizes[0]}: name the dense model "
            "that was compressed as --teacher"
        )


def _trainable(model: nn.Module, what: str) -> Iterator[nn.Parameter]:
    if what == "all":
        yield from model.parameters()
        return
    for _, layer in compressed_layers(model):
        yield from layer.parameters()
    if what == "norms":
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                yield from module.parameters(recurse=False)


def _arguments(settings: FinetuneSettings, work: Path, model: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.max_steps,
        per_device_train_batch_size=share(settings.batch_size, settings.gradient_accumulation),
        per_device_eval_batch_size=1,  # Trainer weighs batches alike, whatever they hold
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * settings.max_steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(10, settings.eval_every),
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        use_cache=getattr(model.config, "use_cache", True),  # Trainer writes it into the config
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )


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
    parameters: list[nn.Parameter],
    tokens: Tensor,
    settings: FinetuneSettings,
    seconds: float,
) -> Recovery:
    state = trainer.state
    losses = tuple(
        (int(entry["step"]), float(entry["eval_loss"]))
        for entry in state.log_history
        if "eval_loss" in entry
    )
    each = settings.batch_size * tokens.shape[1]
    return Recovery(
        state.global_step,
        state.global_step * each,
        sum(parameter.numel() for parameter in parameters),
        state.best_global_step or 0,
        losses[0][1],
        min(loss for _, loss in losses),
        losses,
        seconds,
    )


class Steps(TrainerCallback):  # type: ignore[misc]
    """Reports each step to a `Progress`."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._steps = iter(progress(range(steps), "Training", steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        next(self._steps, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        list(self._steps)
