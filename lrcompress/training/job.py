"""A training command: checks its inputs, trains with checkpoints, and saves the trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.config import TrainingSettings
from lrcompress.data.training_text import TrainingText, training_text
from lrcompress.models.loading import Loaded
from lrcompress.runtime import distributed, locks
from lrcompress.runtime.atomic_io import discard
from lrcompress.runtime.distributed import run_on_all, run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra
from lrcompress.runtime.progress import Progress
from lrcompress.training import fsdp
from lrcompress.training.loop import Trained, TrainingInputs
from lrcompress.training.teacher_cache import TeacherCache
from lrcompress.training.trainer import BlockDataset


class TrainingJob(ABC):
    """One run of a training command, the same calls in every process.

    A step that fails in one process fails in all, so that none waits for another.
    """

    command: ClassVar[str]
    stage: ClassVar[fingerprints.Stage]
    record_key: ClassVar[str]  # the key of lrcompress.json that holds the result of training

    def __init__(self, settings: TrainingSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress

    @abstractmethod
    def check_inputs(self) -> dict[str, Any]:
        """Raises InputError where settings or inputs do not fit; loads no weights.

        Returns the record (lrcompress.json) that the result starts from.
        """

    @abstractmethod
    def load(self, work: Path) -> Loaded:
        """The model to train and its tokenizer; `work` is the folder of the run."""

    @abstractmethod
    def train(self, model: Any, text: TrainingText, checkpoints: Path) -> Trained:
        """Trains `model` in place, with checkpoints in the folder `checkpoints`."""

    @abstractmethod
    def fingerprint_inputs(self) -> list[Any]:
        """Everything that decides the result of training, except the text."""

    def model_record(self) -> dict[str, Any]:
        """Keys of the record that describe the model itself, and not its training."""
        return {}

    def training_inputs(
        self, text: TrainingText, checkpoints: Path, cache: TeacherCache | None = None
    ) -> TrainingInputs:
        """The sequences of `text`, the held-out ones apart, with what `cache` holds for them."""
        held_out = self.settings.held_out
        sequences = BlockDataset(text.tokens, cache, labels=text.labels)
        return TrainingInputs(
            blocks=sequences.part(held_out),
            held_out=sequences.part(0, held_out),
            checkpoints=checkpoints,
            progress=self.progress,
        )

    def run(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        """Trains and saves to `out`; returns the content of lrcompress.json."""
        with locks.beside(out, replace):
            return self._run(out, resume, replace)

    def _run(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        record = run_on_all(self._check_inputs)
        work = out.with_name(f".{out.name}.{self.command}")
        model, tokenizer = run_on_all(lambda: self.load(work))
        text = run_on_main(lambda: training_text(model, tokenizer, self.settings, self.command))
        if not resume:
            run_on_main(lambda: discard(work, out))
        trained = self._train(model, text, work, out)
        settings = {"settings": self.settings.model_dump(mode="json")}
        record |= self.model_record() | {
            self.record_key: asdict(trained) | settings | text.fingerprint
        }
        state_dict = fsdp.gather_state_dict(model)
        saved = run_on_main(
            lambda: save_checkpoint(model, tokenizer, out, record, replace, state=state_dict)
        )
        run_on_main(lambda: discard(work, out))
        _refuse_divergence(trained, out)
        return saved

    def _check_inputs(self) -> dict[str, Any]:
        if not self.settings.data:
            raise InputError(
                f"{self.command} needs text to train on: give --data FILE.txt or another SPEC"
            )
        return self.check_inputs()

    def _train(self, model: Any, text: TrainingText, work: Path, out: Path) -> Trained:
        """Keeps checkpoints in a subfolder of `work` that is named after the inputs of this run."""
        fingerprint = run_on_main(
            lambda: fingerprints.digest([*self.fingerprint_inputs(), text.fingerprint], self.stage)
        )
        checkpoints = work / fingerprint[:16]
        distributed.make_shared_folder(checkpoints)
        try:
            return run_on_all(lambda: self.train(model, text, checkpoints))
        except InputError:
            if distributed.is_main():  # training again from the checkpoints would fail again
                discard(work, out)
            raise


def _refuse_divergence(trained: Trained, out: Path) -> None:
    if trained.diverged:
        raise InputError(
            f"training diverged: {trained.diverged}; {str(out)!r} holds the best weights before "
            f"it, of step {trained.best_step}: use a smaller --learning-rate"
        )


def check_training_settings(settings: TrainingSettings, device: str, command: str) -> None:
    """Raises InputError for settings that cannot work on this machine; loads no model."""
    distributed.sequences_per_pass(settings.batch_size, settings.gradient_accumulation)
    if settings.shard:
        fsdp.check_processes(command, device)
    if settings.tensorboard is not None:
        require_extra("tensorboard", "tensorboard")


def check_device(device: str, command: str) -> None:
    """Raises InputError for a GPU other than the first: Trainer takes the first one it sees."""
    if device.startswith("cuda:") and device != "cuda:0":
        raise InputError(
            f"{command} takes the first GPU and the device is {device!r}: set "
            f"CUDA_VISIBLE_DEVICES={device[5:]} and use --device auto"
        )
