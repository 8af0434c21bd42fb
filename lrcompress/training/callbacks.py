"""What a training run says while it runs: its pace on the terminal, its curves to TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.runtime.progress import Progress, Status


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each step to a `Progress`, with loss and tokens per second.

    The time of measurements and checkpoints between the steps is not counted.
    """

    def __init__(self, progress: Progress, steps: int, tokens: int) -> None:
        self.tokens, self.done, self.seconds, self.began = tokens, 0, 0.0, 0.0
        self._status = Status()
        self._steps = _each(progress(self._statuses(steps), "Training", steps))

    @property
    def tokens_per_second(self) -> float:
        """Of the steps of this process; 0 before the first."""
        return self.done * self.tokens / self.seconds if self.seconds else 0.0

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
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.done += 1
        self.seconds += time.perf_counter() - self.began
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        said = f"loss {losses[-1]:.3f}, " if losses else ""
        left = (state.max_steps - state.global_step) * self.seconds / self.done
        clock = f"{left // 60:.0f}:{left % 60:02.0f} left"
        self._status = Status(f"{said}{self.tokens_per_second:,.0f} tokens/s, {clock}")
        next(self._steps, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step < state.max_steps:
            self._steps.close()  # stopped early: what is left is not done
        else:
            list(self._steps)


def _each(items: Iterable[Status]) -> Generator[Status]:
    yield from items


def tensorboard(folder: str | None) -> list[TrainerCallback]:
    """The callback that writes to `folder`, if there is one."""
    if folder is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=folder))]
