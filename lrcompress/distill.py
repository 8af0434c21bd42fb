"""Training a compressed model towards its dense teacher, on transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.divergence import hidden_error, kl_divergence, token_loss, top_k_divergence
from lrcompress.sharding import ShardingTrainer
from lrcompress.teacher import IDS, LOG_PROBS, TeacherCache

# a loss this many times the best one is divergence
DIVERGED = 3.0


class BlockDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed token blocks (samples, length) as the Trainer reads them.

    With a cache each comes with the teacher's predictions; `first` is its number there.
    """

    def __init__(self, blocks: Tensor, cache: TeacherCache | None = None, first: int = 0) -> None:
        self.blocks, self.cache, self.first = blocks, cache, first

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        kept = {} if self.cache is None else self.cache.read(self.first + index)
        return {"input_ids": block, "labels": block} | kept  # Trainer wants labels for a loss


@dataclass(frozen=True)
class Objective:
    """Forward KL to the teacher at a temperature, plus weights of what else is trained for."""

    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden_states: float = 0.0


class DistillationTrainer(ShardingTrainer):
    """`teacher` may be None where every sequence brings its predictions."""

    def __init__(self, *, teacher: Any, objective: Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)
        self.objective = objective
        # the loss is a mean over a micro-batch: Trainer must divide by the accumulation steps
        self.loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        asked = self.objective
        tokens, states = inputs["input_ids"], asked.hidden_states > 0
        outputs = model(input_ids=tokens, use_cache=False, output_hidden_states=states)
        student = outputs.logits[:, :-1].flatten(0, 1)
        if LOG_PROBS in inputs:
            kept = (inputs[IDS].flatten(0, 1), inputs[LOG_PROBS].flatten(0, 1))
            loss = top_k_divergence(student, *kept, asked.temperature)
        else:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(
                    input_ids=tokens, use_cache=False, output_hidden_states=states
                )
            teacher = taught.logits[:, :-1].flatten(0, 1)
            loss = kl_divergence(student, teacher, asked.temperature)
            if states:
                error = hidden_error(outputs.hidden_states, taught.hidden_states)
                loss = loss + asked.hidden_states * error
        if asked.cross_entropy:
            loss = loss + asked.cross_entropy * token_loss(student, tokens[:, 1:].flatten())
        return (loss, {"loss": loss}) if return_outputs else loss


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops a run that diverges, or that has not improved for `patience` measurements.

    It remembers nothing but the reason: what it needs is in the state that checkpoints keep.
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
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            self._diverged(control, f"the training loss is {loss} at step {state.global_step}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses = [loss for _, loss in held_out_losses(state)]
        now, best = losses[-1], min(losses)
        if not math.isfinite(now) or now > DIVERGED * best:
            self._diverged(control, f"the held-out loss is {now:.4g} at step {state.global_step}")
        elif self.patience and len(losses) - 1 - losses.index(best) >= self.patience:
            control.should_training_stop = True

    def _diverged(self, control: TrainerControl, reason: str) -> None:
        self.diverged = reason
        control.should_training_stop = True


def held_out_losses(state: TrainerState) -> list[tuple[int, float]]:
    """(step, loss) of every measurement, in order."""
    found = [entry for entry in state.log_history if "eval_loss" in entry]
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in found]
