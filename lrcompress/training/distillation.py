"""Training a compressed model towards its dense teacher, on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.training.losses import hidden_error, kl_divergence, token_loss, top_k_divergence
from lrcompress.training.teacher_cache import IDS, LOG_PROBS
from lrcompress.training.trainer import TextTrainer, counted


@dataclass(frozen=True)
class Objective:
    """What the student is trained for: the forward KL divergence, and weights of further losses."""

    temperature: float = 1.0  # of the KL divergence
    cross_entropy: float = 0.0  # weight of the cross-entropy of the next tokens
    hidden_states: float = 0.0  # weight of the relative squared error of every block's output


class DistillationTrainer(TextTrainer):
    """Trains a student towards `teacher`, which may be None if all sequences have predictions."""

    def __init__(self, *, teacher: Any, objective: Objective, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)
        self.objective = objective

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        objective, tokens, labels = self.objective, inputs["input_ids"], inputs["labels"]
        student = model(
            input_ids=tokens, use_cache=False, output_hidden_states=objective.hidden_states > 0
        )
        logits = counted(student.logits[:, :-1], labels)
        if LOG_PROBS in inputs:
            ids, log_probs = (counted(inputs[key], labels) for key in (IDS, LOG_PROBS))
            loss = top_k_divergence(logits, ids, log_probs, objective.temperature)
        else:
            loss = self._teacher_loss(student, logits, inputs)
        if objective.cross_entropy:
            targets = counted(labels[:, 1:], labels)
            loss = loss + objective.cross_entropy * token_loss(logits, targets)
        return loss

    def _teacher_loss(self, student: Any, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs the teacher: the KL divergence, and the error of hidden states if it has a weight.

        `student` is the output of the student for the tokens of `inputs`, `logits` its predictions
        (tokens, vocabulary) of those that count. Hidden states count for all tokens.
        """
        objective, tokens, labels = self.objective, inputs["input_ids"], inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.teacher(
                input_ids=tokens, use_cache=False, output_hidden_states=objective.hidden_states > 0
            )
        teacher_logits = counted(teacher.logits[:, :-1], labels)
        loss = kl_divergence(logits, teacher_logits, objective.temperature)
        if objective.hidden_states > 0:
            error = hidden_error(student.hidden_states, teacher.hidden_states)
            loss = loss + objective.hidden_states * error
        return loss
