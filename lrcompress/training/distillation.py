"""Training a compressed model towards its dense teacher, on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.training.losses import hidden_error, kl_divergence, token_loss, top_k_divergence
from lrcompress.training.teacher_cache import IDS, LOG_PROBS
from lrcompress.training.trainer import TextTrainer


@dataclass(frozen=True)
class Objective:
    """Forward KL to the teacher at a temperature, plus weights of what else is trained for."""

    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden_states: float = 0.0


class DistillationTrainer(TextTrainer):
    """`teacher` may be None where every sequence brings its predictions."""

    def __init__(self, *, teacher: Any, objective: Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)
        self.objective = objective

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        asked, tokens = self.objective, inputs["input_ids"]
        outputs = model(
            input_ids=tokens, use_cache=False, output_hidden_states=asked.hidden_states > 0
        )
        student = outputs.logits[:, :-1].flatten(0, 1)
        loss = self._divergence(outputs, student, inputs)
        if asked.cross_entropy:
            loss = loss + asked.cross_entropy * token_loss(student, tokens[:, 1:].flatten())
        return loss

    def _divergence(self, outputs: Any, student: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """From the teacher, live or as kept; of hidden states too, if they are asked for."""
        asked = self.objective
        if LOG_PROBS in inputs:
            kept = (inputs[IDS].flatten(0, 1), inputs[LOG_PROBS].flatten(0, 1))
            return top_k_divergence(student, *kept, asked.temperature)
        states = asked.hidden_states > 0
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(
                input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=states
            )
        teacher = taught.logits[:, :-1].flatten(0, 1)
        loss = kl_divergence(student, teacher, asked.temperature)
        if states:
            error = hidden_error(outputs.hidden_states, taught.hidden_states)
            loss = loss + asked.hidden_states * error
        return loss
