"""A training from folder to folder: checked, resumable, and saved when it is whole."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint import folder as checkpoint_folder
from lrcompress.config import TrainingSettings
from lrcompress.data.corpora import read_corpus
from lrcompress.data.packing import fingerprint, in_turn, token_blocks
from lrcompress.layers.model_info import sequence_length
from lrcompress.runtime import distributed, locks
from lrcompress.runtime.distributed import agreed, from_main
from lrcompress.runtime.files import discard
from lrcompress.runtime.protocols import InputError, Progress
from lrcompress.training import fsdp
from lrcompress.training.loop import Trained

TRAIN_LENGTH = 512


@dataclass(frozen=True)
class Text:
    """Blocks (sequences, length), the held-out ones first, and what identifies them."""

    tokens: Tensor
    mark: dict[str, Any]


class TrainingRun(ABC):
    """One training run. Whatever may fail does so in all processes alike."""

    command: ClassVar[str]
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
    def trained(self, model: Any, text: Text, run: Path) -> Trained:
        """Trains `model` in place, with checkpoints in the folder `run`."""

    @abstractmethod
    def inputs(self) -> list[Any]:
        """All that decides what training gives, but the text."""

    def whole(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        """Trains and saves to `out`; returns what lrcompress.json holds."""
        with locks.beside(out, replace):
            return self._whole(out, resume, replace)

    def _whole(self, out: Path, resume: bool, replace: bool) -> dict[str, Any]:
        record = agreed(self._checked)
        work = out.with_name(f".{out.name}.{self.command}")
        model, tokenizer = agreed(lambda: self.loaded(work))
        text = from_main(lambda: training_text(model, tokenizer, self.settings, self.command))
        if not resume:
            from_main(lambda: discard(work, out))
        done = self._trained(model, text, work, out)
        asked = {"settings": self.settings.model_dump(mode="json")}
        record |= self.described() | {self.record_key: asdict(done) | asked | text.mark}
        state = fsdp.whole_state(model)
        saved = from_main(
            lambda: checkpoint_folder.save(model, tokenizer, out, record, replace, state=state)
        )
        from_main(lambda: discard(work, out))
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

    def _trained(self, model: Any, text: Text, work: Path, out: Path) -> Trained:
        """Checkpoints are in a folder of `work` that is this run's alone."""
        run = work / from_main(lambda: fingerprints.digest([*self.inputs(), text.mark])[:16])
        distributed.check_shared(run)
        try:
            return agreed(lambda: self.trained(model, text, run))
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
    distributed.share(settings.batch_size, settings.gradient_accumulation)
    if settings.shard:
        fsdp.check_processes(command, device)
    if settings.tensorboard is not None:
        check_package("tensorboard", "tensorboard")


def check_package(package: str, extra: str) -> None:
    """Raises InputError where a package of the optional dependencies `extra` is missing."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{extra} needs {package}: pip install 'lrcompress[{extra}]'")


def check_device(device: str, command: str) -> None:
    if device.startswith("cuda:") and device != "cuda:0":
        raise InputError(
            f"{command} takes the first GPU and the device is {device!r}: set "
            f"CUDA_VISIBLE_DEVICES={device[5:]} and use --device auto"
        )


def training_text(model: Any, tokenizer: Any, settings: TrainingSettings, command: str) -> Text:
    """As many sequences as the steps need, or as many whole steps as the texts hold; those are then
    read more than once.
    """
    if tokenizer is None:
        raise InputError(f"{command} reads text and the model has no tokenizer: add its files")
    length = sequence_length(model, settings.train_length)
    if settings.train_length is None:
        length = min(length, TRAIN_LENGTH)
    each = settings.batch_size
    wanted = settings.held_out + settings.max_steps * each
    share = -(-wanted // len(settings.data))
    corpora = [read_corpus(spec, "calibration") for spec in settings.data]
    parts = [token_blocks(c, tokenizer, share, length, settings.seed, fewer=True) for c in corpora]
    blocks = in_turn(parts)[:wanted]
    if len(blocks) < settings.held_out + each:
        raise InputError(
            f"{', '.join(settings.data)}: {len(blocks)} sequences of {length} tokens are too few "
            f"to hold {settings.held_out} out: give more text, or a smaller --held-out"
        )
    blocks = blocks[: len(blocks) - (len(blocks) - settings.held_out) % each]
    mark = fingerprint(settings.data, blocks, settings.seed)
    text = {"sequences": mark.num_samples, "length": length, "sha256": mark.sha256}
    return Text(blocks, text | {"sketch": mark.sketch.to_dict()})
