"""One training run on transformers' Trainer; an interrupted one goes on from its checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lrcompress.config import TrainingSettings
from lrcompress.runtime.distributed import run_on_main, sequences_per_pass
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress
from lrcompress.training.callbacks import ProgressCallback, tensorboard
from lrcompress.training.trainer import BlockDataset, EarlyStopping, TextTrainer, held_out_losses

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Trained:
    """What training did: held-out losses (nats per token) by step, None where not finite.

    The weights of the best step are kept; `after` is their loss as they are saved: merged, packed,
    in the model's own precision.
    `seconds` are of this process, and the rate is of the steps that it took; None if it took none.
    `diverged` is the reason for which training was stopped, if it was. `guided_share` is that of
    the compressed layers which a teacher's weights guided, if that was asked for.
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
    guided_share: float | None = None

    def then(self, other: Trained) -> Trained:
        """One training of this and `other`, which went on with what this one had made."""
        tokens, rate = self.tokens + other.tokens, None
        if self.tokens_per_second and other.tokens_per_second:
            spent = self.tokens / self.tokens_per_second + other.tokens / other.tokens_per_second
            rate = tokens / spent
        return replace(
            other,
            steps=self.steps + other.steps,
            tokens=tokens,
            best_step=self.steps + other.best_step,
            before=self.before,
            losses=self.losses + tuple((self.steps + step, x) for step, x in other.losses),
            seconds=self.seconds + other.seconds,
            tokens_per_second=rate,
        )


def run(
    model: Any,
    prepared: AbstractContextManager[Any],
    trainer: Callable[..., TextTrainer],
    blocks: BlockDataset,
    held_out: BlockDataset,
    settings: TrainingSettings,
    work: Path,
    progress: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Trains `model` in place; the parameters of the best measurement stay.

    Inside `prepared` the model is as it trains; what is entered is given to `trainer`, and what of
    it wants a gradient trains. Checkpoints are kept in `work`; a run that finds one there goes on
    from it. Raises InputError where nothing is gained.
    """
    started, found = time.perf_counter(), run_on_main(lambda: last_checkpoint(work))
    watch = EarlyStopping(settings.patience)
    each = settings.batch_size * blocks.blocks.shape[1]
    steps = ProgressCallback(progress, settings.max_steps, each)
    with prepared as student:
        made = trainer(
            model=student,
            args=_arguments(settings, work, model, found is None),
            train_dataset=blocks,
            eval_dataset=held_out,
            callbacks=[watch, steps, *callbacks, *tensorboard(settings.tensorboard)],
        )
        _go_on(made, watch, found)
        count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    after = made.loss_of(model)
    return _trained(made, watch, count, each, after, steps, time.perf_counter() - started)


def _go_on(trainer: TextTrainer, watch: EarlyStopping, found: str | None) -> None:
    """Trains from the checkpoint `found`, unless it is of a run that had ended."""
    if found is not None:
        state = TrainerState.load_from_json(str(Path(found) / STATE))
        if watch.has_ended(state):
            trainer.restore(state)
            return
    trainer.train(resume_from_checkpoint=found)


def autocast(model: Any, settings: TrainingSettings) -> bool:
    """Whether products are in bfloat16."""
    on_cuda = model.device.type == "cuda"
    return settings.precision == "bfloat16" or (settings.precision == "auto" and on_cuda)


def _arguments(
    settings: TrainingSettings, work: Path, model: Any, from_start: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.max_steps,
        per_device_train_batch_size=sequences_per_pass(
            settings.batch_size, settings.gradient_accumulation
        ),
        per_device_eval_batch_size=1,  # Trainer weighs batches alike, whatever they hold
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warm_up * settings.max_steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
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
        bf16=autocast(model, settings),
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


def _trained(
    trainer: TextTrainer,
    watch: EarlyStopping,
    count: int,
    each: int,
    after: float,
    steps: ProgressCallback,
    seconds: float,
) -> Trained:
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
    return Trained(
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
