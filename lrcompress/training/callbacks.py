"""Callbacks that report a training run: its pace on the terminal, its curves to TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.runtime.progress import Progress, Status


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each step to a `Progress`, with the loss, tokens per second and time left.

    `seconds` is the time of the steps alone, without measurements and checkpoints between them.
    """

    def __init__(self, progress: Progress, steps: int, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.finished_steps, self.seconds, self.step_started = 0, 0.0, 0.0
        self._status = Status()
        self._steps = _generator(progress(self._statuses(steps), "Training", steps))

    @property
    def tokens_per_second(self) -> float:
        """Over the steps of this process; 0 before the first."""
        return self.finished_steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def _statuses(self, steps: int) -> Iterator[Status]:
        for _ in range(steps):
            yield self._status

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for _step in range(state.global_step):
            next(self._steps, None)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.finished_steps += 1
        self.seconds += time.perf_counter() - self.step_started
        losses = training_losses(state)
        loss = f"loss {losses[-1]:.3f}, " if losses else ""
        seconds = (state.max_steps - state.global_step) * self.seconds / self.finished_steps
        time_left = f"{seconds // 60:.0f}:{seconds % 60:02.0f} left"
        self._status = Status(f"{loss}{self.tokens_per_second:,.0f} tokens/s, {time_left}")
        next(self._steps, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step < state.max_steps:
            self._steps.close()  # stopped early: the other steps stay undone
        else:
            list(self._steps)


def _generator(statuses: Iterable[Status]) -> Generator[Status]:
    """`statuses` as something that can be closed."""
    yield from statuses


def training_losses(state: TrainerState) -> list[float]:
    """The training losses that were logged so far, in order."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def tensorboard(folder: str | None) -> list[TrainerCallback]:
    """The callback that writes the curves to `folder`; none without a folder."""
    if folder is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=folder))]
