"""Training for some minutes: the learning rate follows the clock, and the time ends the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lrcompress.runtime.distributed import run_on_main


class TimeLimit(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Ends a training after `seconds`, its held-out measurements and checkpoints included.

    `share` of the time has passed; it is 1 as soon as only the last measurement still fits in. All
    processes have the main one's, at each step. The first `warm_up` of it is for the rising
    learning rate. `elapsed` is in the checkpoints, so that a resumed training has the rest of its
    time. `clock` returns seconds.
    """

    def __init__(
        self, seconds: float, warm_up: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.warm_up, self.clock = seconds, warm_up, clock
        self.share, self.elapsed = 0.0, 0.0
        self.measurement = 0.0  # seconds of the latest one, with its checkpoint
        self._began = self._step_ended = 0.0

    @property
    def rate(self) -> float:
        """The learning rate's share of its peak: it rises linearly, then falls along a cosine."""
        if self.share < self.warm_up:
            return self.share / self.warm_up
        return (1 + math.cos(math.pi * (self.share - self.warm_up) / (1 - self.warm_up))) / 2

    def has_ended(self, state: TrainerState) -> bool:
        """Whether the time of a training with this state, from a checkpoint, is over."""
        return bool(_saved(state).get("share", 0.0) >= 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for name, value in _saved(state).items():
            setattr(self, name, value)
        self._step_ended = self.clock()
        self._began = self._step_ended - self.elapsed

    def _read_clock(self) -> None:
        self.elapsed = self.clock() - self._began

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the scheduler sets the next step's learning rate."""
        self._read_clock()
        self.share = run_on_main(self._share)

    def _share(self) -> float:
        seconds_of_steps = self.seconds - self.measurement
        return self.elapsed / seconds_of_steps if self.elapsed < seconds_of_steps else 1.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_ended = self.clock()
        if self.share >= 1:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._read_clock()
        self.measurement = self.clock() - self._step_ended

    on_save = on_evaluate  # the checkpoint of a measurement comes after it

    def state(self) -> dict[str, Any]:
        """What Trainer puts into its checkpoints."""
        names = ("share", "elapsed", "measurement")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}


def _saved(state: TrainerState) -> dict[str, float]:
    """What `TimeLimit.state` put into a checkpoint; empty if there was none."""
    saved: dict[str, dict[str, float]] = state.stateful_callbacks.get(TimeLimit.__name__, {})
    return saved.get("attributes", {})
