"""A training from folder to folder: checked, resumable, and saved when it is whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.config import TrainingSettings
from lrcompress.data.training_text import TrainingText, training_text
from lrcompress.runtime import distributed, locks
from lrcompress.runtime.atomic_io import discard
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra
from lrcompress.runtime.progress import Progress
from lrcompress.training import fsdp
from lrcompress.training.loop import Trained


class TrainingJob(ABC):
    """One training run. Whatever may fail does so in all processes alike."""

    command: ClassVar[str]
    stage: ClassVar[fingerprints.Stage]
    record_key: ClassVar[str]

    def __init__(self, settings: TrainingSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress

    @abstractmethod
    def checked(self) -> dict[str, Any]:
        """The record that the result begins with, if nothing given is wrong."""

    @abstractmethod
    def loaded(self, work: Path) -> tuple[Any, Any]:
        """The model that is trained, and its tokenizer; `work` is the folder of the run."""

    @abstractmethod
    def trained(self, model: Any, text: TrainingText, run: Path) -> Trained:
        """Trains `model` in place, with checkpoints in the folder `run`."""

    @abstractmethod
    def inputs(self) -> list[Any]:
        """All that decides what training gives, but the text."""

    def whole(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        """Trains and saves to `out`; returns what lrcompress.json holds."""
        with locks.beside(out, replace):
            return self._whole(out, resume, replace)

    def _whole(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        record = run_on_all(self._checked)
        work = out.with_name(f".{out.name}.{self.command}")
        model, tokenizer = run_on_all(lambda: self.loaded(work))
        text = run_on_main(lambda: training_text(model, tokenizer, self.settings, self.command))
        if not resume:
            run_on_main(lambda: discard(work, out))
        done = self._trained(model, text, work, out)
        asked = {"settings": self.settings.model_dump(mode="json")}
        record |= self.described() | {self.record_key: asdict(done) | asked | text.fingerprint}
        state = fsdp.whole_state(model)
        saved = run_on_main(
            lambda: save_checkpoint(model, tokenizer, out, record, replace, state=state)
        )
        run_on_main(lambda: discard(work, out))
        _refuse_divergence(done, out)
        return saved

    def described(self) -> dict[str, Any]:
        """What the record says of the model that was trained, beside the training."""
        return {}

    def _checked(self) -> dict[str, Any]:
        if not self.settings.data:
            raise InputError(
                f"{self.command} needs text to train on: give --data FILE.txt or another SPEC"
            )
        return self.checked()

    def _trained(self, model: Any, text: TrainingText, work: Path, out: Path) -> Trained:
        """Checkpoints are in a folder of `work` that is this run's alone."""
        run = work / run_on_main(
            lambda: fingerprints.digest([*self.inputs(), text.fingerprint], self.stage)[:16]
        )
        distributed.make_shared_folder(run)
        try:
            return run_on_all(lambda: self.trained(model, text, run))
        except InputError:
            if distributed.is_main():  # another try would end like this one
                discard(work, out)
            raise


def _refuse_divergence(done: Trained, out: Path) -> None:
    if done.diverged:
        raise InputError(
            f"training diverged: {done.diverged}; {str(out)!r} holds the best weights before it, "
            f"of step {done.best_step}: use a smaller --learning-rate"
        )


def check_settings(settings: TrainingSettings, device: str, command: str) -> None:
    """Raises InputError for what cannot work on this machine, before anything is loaded."""
    distributed.sequences_per_pass(settings.batch_size, settings.gradient_accumulation)
    if settings.shard:
        fsdp.check_processes(command, device)
    if settings.tensorboard is not None:
        require_extra("tensorboard", "tensorboard")


def check_device(device: str, command: str) -> None:
    if device.startswith("cuda:") and device != "cuda:0":
        raise InputError(
            f"{command} takes the first GPU and the device is {device!r}: set "
            f"CUDA_VISIBLE_DEVICES={device[5:]} and use --device auto"
        )
