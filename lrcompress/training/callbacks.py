"""Callbacks that report a training run: its pace on the terminal, its curves to TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.runtime.progress import Progress, Status
from lrcompress.training.time_limit import TimeLimit


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each step to a `Progress`, with the loss, tokens per second and time left.

    What it counts are the `steps`, or the seconds of `time_limit` if there is one. `seconds` is the
    time of the steps alone, without measurements and checkpoints between them.
    """

    def __init__(
        self,
        progress: Progress,
        steps: int,
        tokens_per_step: int,
        time_limit: TimeLimit | None = None,
    ) -> None:
        self.tokens_per_step, self.time_limit = tokens_per_step, time_limit
        self.finished_steps, self.seconds, self.step_started = 0, 0.0, 0.0
        total, title = steps, "Training"
        if time_limit is not None:
            total, title = math.ceil(time_limit.seconds), "Training (seconds)"
        self._status, self._shown = Status(), 0
        self._items = _generator(progress(self._statuses(total), title, total))

    @property
    def tokens_per_second(self) -> float:
        """Over the steps of this process; 0 before the first."""
        return self.finished_steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def _statuses(self, total: int) -> Iterator[Status]:
        for _ in range(total):
            yield self._status

    def _show(self, state: TrainerState) -> None:
        """Advances the progress to where the training is."""
        limit = self.time_limit
        count = state.global_step if limit is None else int(min(limit.elapsed, limit.seconds))
        for _ in range(self._shown, count):
            next(self._items, None)
        self._shown = count

    def _seconds_left(self, state: TrainerState) -> float:
        if self.time_limit is not None:
            return max(0.0, self.time_limit.seconds - self.time_limit.elapsed)
        steps_left: int = state.max_steps - state.global_step
        return steps_left * self.seconds / self.finished_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._show(state)

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
        seconds = self._seconds_left(state)
        time_left = f"{seconds // 60:.0f}:{seconds % 60:02.0f} left"
        self._status = Status(f"{loss}{self.tokens_per_second:,.0f} tokens/s, {time_left}")
        self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        limit = self.time_limit
        if state.global_step < state.max_steps if limit is None else limit.share < 1:
            self._items.close()  # stopped early: the rest stays undone
        else:
            list(self._items)


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
