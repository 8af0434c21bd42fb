"""Training a compressed model towards its dense teacher, on transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.protocols import InputError
from lrcompress.sharding import ShardingTrainer

# rows of logits whose distributions are compared at a time: vocabularies are large
ROWS = 256
# a held-out loss this many times the best one is divergence
DIVERGED = 3.0


class BlockDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed token blocks (samples, length) as the Trainer reads them."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}  # without labels Trainer measures no loss


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, logits (tokens, vocabulary).

    At a temperature T both are softened and the result is multiplied by T², so that the size of
    gradients does not depend on T (Hinton et al. 2015).
    """
    total = student.new_zeros((), dtype=torch.float32)
    for begin in range(0, len(student), ROWS):
        rows = slice(begin, begin + ROWS)
        log_q = (student[rows].float() / temperature).log_softmax(-1)
        log_p = (teacher[rows].float() / temperature).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total * temperature**2 / len(student)


class DistillationTrainer(ShardingTrainer):
    """Forward KL to the teacher, plus `cross_entropy` times the language-model loss."""

    def __init__(
        self, *, teacher: nn.Module, temperature: float, cross_entropy: float, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.cross_entropy = temperature, cross_entropy
        # the loss is a mean over a micro-batch: Trainer must divide by the accumulation steps
        self.loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        tokens = inputs["input_ids"]
        outputs = model(input_ids=tokens, use_cache=False)
        with torch.no_grad():
            teacher = self.teacher(input_ids=tokens, use_cache=False).logits[:, :-1]
        student = outputs.logits[:, :-1]
        loss = kl_divergence(student.flatten(0, 1), teacher.flatten(0, 1), self.temperature)
        if self.cross_entropy:
            labels = tokens[:, 1:].flatten()
            loss = loss + self.cross_entropy * nn.functional.cross_entropy(
                student.flatten(0, 1).float(), labels
            )
        return (loss, {"loss": loss}) if return_outputs else loss


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops a run that diverges, and says why."""

    def __init__(self) -> None:
        self.best = math.inf
        self.reason: str | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            self._stop(control, f"the training loss is {loss} at step {state.global_step}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.nan)
        if not math.isfinite(loss) or loss > DIVERGED * self.best:
            self._stop(control, f"the held-out loss is {loss:.4g} at step {state.global_step}")
        self.best = min(self.best, loss)

    def _stop(self, control: TrainerControl, reason: str) -> None:
        self.reason = reason
        control.should_training_stop = True


def refuse_divergence(watch: Watch) -> None:
    """Raises InputError if the run that `watch` saw was stopped."""
    if watch.reason is not None:
        raise InputError(f"training diverged: {watch.reason}; use a smaller --learning-rate")
