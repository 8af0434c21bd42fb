"""A transformers Trainer for packed text, its dataset, and the callback that stops a bad run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.data.packing import IGNORED
from lrcompress.runtime.atomic_io import writing_state
from lrcompress.training.callbacks import training_losses
from lrcompress.training.fsdp import ShardingTrainer
from lrcompress.training.losses import token_loss
from lrcompress.training.teacher_cache import TeacherCache
from lrcompress.training.time_limit import TimeLimit

# training has diverged where the held-out loss is more than this many times the best one
DIVERGENCE_RATIO = 3.0


class BlockDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed token blocks (sequences, length) and their labels, as Trainer reads them.

    Without `labels` all tokens count. With a cache every sequence comes with the teacher's
    predictions; `first` is the number of the first sequence in the cache.
    """

    def __init__(
        self,
        blocks: Tensor,
        cache: TeacherCache | None = None,
        first: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        self.blocks, self.cache, self.first = blocks, cache, first
        self.labels = blocks if labels is None else labels

    def part(self, begin: int, end: int | None = None) -> BlockDataset:
        """The sequences from `begin` to `end`, without `end`."""
        labels = self.labels[begin:end]
        return BlockDataset(self.blocks[begin:end], self.cache, self.first + begin, labels)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequence = {"input_ids": self.blocks[index], "labels": self.labels[index]}
        return sequence | ({} if self.cache is None else self.cache.read(self.first + index))


class TextTrainer(ShardingTrainer):
    """Minimizes the mean cross-entropy of the next tokens; subclasses override `loss`.

    With a `time_limit` the learning rate follows its time, and not the steps.
    """

    def __init__(self, *, time_limit: TimeLimit | None = None, **arguments: Any) -> None:
        self.time_limit = time_limit
        super().__init__(**arguments)
        # the loss is a mean over a micro-batch: Trainer has to divide it by the accumulation steps
        self.loss_is_scaled_for_ga = False

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        limit = self.time_limit
        if limit is not None:
            self.lr_scheduler: Any = LambdaLR(self.optimizer, lambda _: limit.rate)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss = self.loss(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean loss in nats per token of the sequences `input_ids` (batch, length), over the tokens
        that have `labels`."""
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        labels = inputs["labels"]
        return token_loss(counted(logits[:, :-1], labels), counted(labels[:, 1:], labels))

    @torch.no_grad()
    def loss_of(self, model: Any) -> float:
        """Mean held-out loss of `model` without autocast; every process computes all of it."""
        model.eval()
        losses = []
        for index in range(len(self.eval_dataset)):
            row = self.eval_dataset[index]
            batch = {key: value[None].to(model.device) for key, value in row.items()}
            losses.append(float(self.compute_loss(model, batch)))
        return sum(losses) / len(losses)

    def restore(self, state: TrainerState) -> None:
        """Loads the best weights of a run that has ended, if any held-out loss was finite."""
        self.state = state
        if state.best_model_checkpoint is not None:
            self._load_best_model()

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        with (
            writing_state(f"a checkpoint in {self.args.output_dir!r}"),
            _without_renaming(self.model),
        ):
            super()._save_checkpoint(*arguments, **keywords)


def counted(rows: Tensor, labels: Tensor) -> Tensor:
    """Of `rows` (batch, length - 1, ...), one for each predicted token, those (tokens, ...) whose
    token counts by `labels` (batch, length)."""
    counts = labels[:, 1:].flatten() != IGNORED
    flat = rows.flatten(0, 1)
    return flat if bool(counts.all()) else flat[counts]


@contextmanager
def _without_renaming(model: Any) -> Iterator[None]:
    """Inside, transformers saves weights under their names in the model.

    Trainer loads a checkpoint by these names, while some model families use other names in files.
    """
    conversions = vars(model).get("_weight_conversions")
    model._weight_conversions = []
    try:
        yield
    finally:
        del model._weight_conversions
        if conversions is not None:
            model._weight_conversions = conversions


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Stops a run that diverges, or whose held-out loss has not improved `patience` times in a row.

    `diverged` is the reason if the run diverged. Everything else is read from the trainer's state,
    which is in the checkpoints, so that a resumed run stops at the same step.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.diverged: str | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        control.should_training_stop |= self.has_ended(state)

    def has_ended(self, state: TrainerState) -> bool:
        """Whether a run with this state is over; sets `diverged` if it diverged."""
        training = training_losses(state)
        losses = [loss for _, loss in held_out_losses(state)]
        best = min((loss for loss in losses if math.isfinite(loss)), default=math.inf)
        if training and not math.isfinite(training[-1]):
            self.diverged = f"the training loss is {training[-1]} at step {state.global_step}"
        elif losses and not losses[-1] <= DIVERGENCE_RATIO * best:
            self.diverged = f"the held-out loss is {losses[-1]:.4g} at step {state.global_step}"
        if self.diverged or (state.max_steps and state.global_step >= state.max_steps):
            return True
        since_best = len(losses) - 1 - losses.index(best) if math.isfinite(best) else 0
        return self.patience is not None and since_best >= self.patience


def held_out_losses(state: TrainerState) -> list[tuple[int, float]]:
    """(step, held-out loss) of every measurement, in order."""
    entries = [entry for entry in state.log_history if "eval_loss" in entry]
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in entries]
