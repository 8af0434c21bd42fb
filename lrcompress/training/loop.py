"""One training run on transformers' Trainer. An interrupted run resumes from its checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrcompress.config import TrainingSettings
from lrcompress.reporting.projection import Projection, project
from lrcompress.runtime.distributed import run_on_main, sequences_per_pass
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent
from lrcompress.training.callbacks import ProgressCallback, tensorboard
from lrcompress.training.time_limit import TimeLimit
from lrcompress.training.trainer import BlockDataset, EarlyStopping, TextTrainer, held_out_losses

STATE_FILE = "trainer_state.json"

# relative fall of the held-out loss that the order of its sums can make
ROUNDING = 1e-6
MakeTrainer = Callable[..., TextTrainer]  # a subclass, or one with some arguments set


@dataclass(frozen=True)
class TrainingInputs:
    """What a training run reads, the folder of its checkpoints, and how it shows progress."""

    blocks: BlockDataset
    held_out: BlockDataset
    checkpoints: Path
    progress: Progress = silent


@dataclass(frozen=True)
class Trained:
    """The result of a training run.

    `losses` are (step, held-out loss in nats per token), with None for a loss that is not finite.
    `before` and `after` are the first such loss and that of the saved model, after merging and
    packing, in the model's own precision. The model has the weights of `best_step`.
    `seconds` are those of this process. `tokens_per_second` covers the steps that this process
    took; it is None if there were none. `diverged` is why training was stopped, if it diverged.
    `guided_share` is the share of the compressed layers that had a dense guide; it is None unless
    training was self-guided. `projection` is what more tokens would have given.
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
    projection: Projection
    diverged: str | None = None
    guided_share: float | None = None

    def followed_by(self, second: Trained) -> Trained:
        """Both runs as one, where `second` started from the result of this one."""
        tokens, rate = self.tokens + second.tokens, None
        if self.tokens_per_second and second.tokens_per_second:
            seconds = (
                self.tokens / self.tokens_per_second + second.tokens / second.tokens_per_second
            )
            rate = tokens / seconds
        return replace(
            second,
            steps=self.steps + second.steps,
            tokens=tokens,
            best_step=self.steps + second.best_step,
            before=self.before,
            losses=self.losses + tuple((self.steps + step, x) for step, x in second.losses),
            seconds=self.seconds + second.seconds,
            tokens_per_second=rate,
            projection=Projection(reason="the model was factorized midway"),
        )


class TrainingLoop:
    """Trains `model` in place; it ends with the weights of the best held-out loss.

    `run` trains the student: the model itself, or a form of it that only exists while it trains,
    such as one with adapters. `result` comes after it, once `model` is as it will be saved. A loop
    that finds a checkpoint in `inputs.checkpoints` resumes from it.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        inputs: TrainingInputs,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.settings, self.inputs = model, settings, inputs
        self.checkpoint = run_on_main(lambda: last_checkpoint(inputs.checkpoints))
        self.tokens_per_step = settings.batch_size * inputs.blocks.blocks.shape[1]
        self.early_stopping = EarlyStopping(settings.patience)
        self.time_limit = time_limit_of(settings)
        self.pace = ProgressCallback(
            inputs.progress, settings.step_limit, self.tokens_per_step, self.time_limit
        )
        limits = [limit for limit in (self.early_stopping, self.time_limit) if limit is not None]
        self.callbacks = [*limits, self.pace, *callbacks]
        self.trainer: TextTrainer | None = None
        self.trained_parameters = 0

    def run(self, student: Any, make_trainer: MakeTrainer) -> None:
        """Trains the parameters of `student` that require a gradient."""
        self.trainer = make_trainer(
            model=student,
            args=_arguments(self.settings, self.inputs.checkpoints, self.model, self.checkpoint),
            train_dataset=self.inputs.blocks,
            eval_dataset=self.inputs.held_out,
            callbacks=[*self.callbacks, *tensorboard(self.settings.tensorboard)],
            time_limit=self.time_limit,
        )
        self._train_or_restore(self.trainer)
        self.trained_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)

    def _train_or_restore(self, trainer: TextTrainer) -> None:
        """Trains from the checkpoint, unless the run that wrote it has ended already."""
        if self.checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE_FILE))
            out_of_time = self.time_limit is not None and self.time_limit.has_ended(state)
            if self.early_stopping.has_ended(state) or out_of_time:
                trainer.restore(state)
                return
        trainer.train(resume_from_checkpoint=self.checkpoint)

    def result(self) -> Trained:
        """Measures the model. Raises InputError where its held-out loss has not improved."""
        assert self.trainer is not None, "run comes first"
        after, state = self.trainer.loss_of(self.model), self.trainer.state
        losses = tuple((s, x if math.isfinite(x) else None) for s, x in held_out_losses(state))
        before = losses[0][1]
        best_step = state.best_global_step  # None if only the first loss, or none, was finite
        diverged, limit = self.early_stopping.diverged, self.time_limit
        if best_step is None or before is None or not after < (1 - ROUNDING) * before:
            outcome = f"diverged: {diverged}" if diverged else "gained nothing on held-out text"
            first = "not finite" if before is None else f"{before:.4g}"
            raise InputError(
                f"training {outcome} (loss {first} before it, {after:.4g} after): use a smaller "
                f"--learning-rate, or more {'--max-steps' if limit is None else '--minutes'}"
            )
        return Trained(
            steps=state.global_step,
            tokens=state.global_step * self.tokens_per_step,
            trained_parameters=self.trained_parameters,
            best_step=best_step,
            before=before,
            after=after,
            losses=losses,
            seconds=time.perf_counter() - self.started,
            tokens_per_second=self.pace.tokens_per_second or None,
            projection=self._projection(losses),
            diverged=diverged,
        )

    def _projection(self, losses: Sequence[tuple[int, float | None]]) -> Projection:
        if self.early_stopping.diverged:
            return Projection(reason="training diverged")
        return project([(step * self.tokens_per_step, loss) for step, loss in losses])


def time_limit_of(settings: TrainingSettings) -> TimeLimit | None:
    """The callback that ends the training by time; None if its number of steps is set."""
    if settings.minutes is None:
        return None
    return TimeLimit(60 * settings.minutes, settings.warm_up)


def uses_autocast(model: Any, settings: TrainingSettings) -> bool:
    """Whether matrix products are computed in bfloat16."""
    on_cuda = model.device.type == "cuda"
    return settings.precision == "bfloat16" or (settings.precision == "auto" and on_cuda)


def _arguments(
    settings: TrainingSettings, checkpoints: Path, model: Any, checkpoint: str | None
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.step_limit,
        per_device_train_batch_size=sequences_per_pass(
            settings.batch_size, settings.gradient_accumulation
        ),
        per_device_eval_batch_size=1,  # Trainer gives batches equal weight, whatever their size
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warm_up * settings.step_limit),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=checkpoint is None,  # a resumed run was measured at its checkpoint
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(10, settings.eval_every),
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        bf16=uses_autocast(model, settings),
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        use_cache=getattr(model.config, "use_cache", True),  # Trainer writes it into the config
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise Trainer copies the model to every GPU
    return arguments


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`; None if there is none."""
    checkpoints = [
        (int(checkpoint.name.rpartition("-")[2]), checkpoint)
        for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if _is_complete(checkpoint)
    ]
    return str(max(checkpoints)[1]) if checkpoints else None


def _is_complete(checkpoint: Path) -> bool:
    """Trainer writes the state file last."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
