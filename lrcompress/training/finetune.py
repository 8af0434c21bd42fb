"""Loads a compressed checkpoint, trains it towards its dense teacher, saves the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint import folder as checkpoint_folder
from lrcompress.config import FinetuneSettings, ModelSettings
from lrcompress.layers.quantized import refuse_quantized
from lrcompress.models.loading import locate
from lrcompress.models.sources import Loaded, load_settings, other_source
from lrcompress.reporting.tables import learned
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import agreed, from_main
from lrcompress.runtime.protocols import InputError, Progress, silent
from lrcompress.training import fsdp, job
from lrcompress.training.job import Text, TrainingRun, check_device, check_package
from lrcompress.training.loop import Trained, autocast
from lrcompress.training.recovery import check_pair, train
from lrcompress.training.teacher_cache import TeacherCache
from lrcompress.training.trainer import BlockDataset

LoadTeacher = Callable[[ModelSettings], Loaded]


def finetune_to(
    source: ModelSettings,
    settings: FinetuneSettings,
    out: Path,
    progress: Progress = silent,
    *,
    resume: bool = True,
    replace: bool = False,
    load_teacher: LoadTeacher | None = None,
) -> dict[str, Any]:
    """Trains the checkpoint `source` and saves it to `out`; returns what lrcompress.json holds.

    Checkpoints are kept beside `out` until it is whole: the same call goes on from the last
    unless `resume` is off. Under torchrun every process calls it, and the main one writes. Raises
    InputError if `out` exists and is not to be replaced, where text, teacher or checkpoint do not
    fit, and where training diverged; the best weights before that are saved.
    """
    with distributed.group(source.device):
        shown = progress if distributed.is_main() else silent
        run = Finetuning(source, settings, shown, load_teacher)
        return run.whole(out, resume, replace)


class Finetuning(TrainingRun):
    """Of a compressed checkpoint, towards its dense teacher."""

    command = "finetune"
    record_key = "finetuned"
    settings: FinetuneSettings

    def __init__(
        self,
        source: ModelSettings,
        settings: FinetuneSettings,
        progress: Progress,
        load_teacher: LoadTeacher | None,
    ) -> None:
        super().__init__(settings, progress)
        self.source, self.load_teacher = source, load_teacher
        self.dense = source  # the teacher, once the checkpoint's record is read
        self.teacher: Any = None

    def checked(self) -> dict[str, Any]:
        source, settings = self.source, self.settings
        check_settings(settings, source.device)
        record = checkpoint_folder.read_record(Path(locate(source.source).path)) or {}
        name = settings.teacher or record.get("source")
        if name is None:
            raise InputError(f"{source.source!r} names no source: give --teacher MODEL")
        self.dense = other_source(source, name)
        for each in (source, self.dense) if settings.shard else ():
            fsdp.check_source(each)
        check_device(source.device, self.command)
        record.pop("metrics", None)  # they are of the model before training
        if "finetuned" in record:
            record["before"] = learned(record)
        return record

    def loaded(self, work: Path) -> Loaded:
        shard = self.settings.shard
        model, tokenizer = load_settings(self.source, **fsdp.placement(self.source, shard))
        refuse_quantized(model, "finetune it before it is quantized")
        fsdp.check_precision(model)
        if shard and self.settings.train == "all":
            fsdp.check_embedding(model, "--train norms")
        if self.load_teacher is not None:
            self.teacher, _ = self.load_teacher(self.dense)
        else:
            place = fsdp.placement(self.dense, shard)
            self.teacher, _ = load_settings(self.dense, **place)
        check_pair(model, self.teacher, self.settings.hidden_states > 0)
        return model, tokenizer

    def trained(self, model: Any, text: Text, run: Path) -> Trained:
        settings, held = self.settings, self.settings.held_out
        cache = self._cache(text)
        if cache is not None and settings.self_guided == "off":
            self.teacher = None  # all that it says is kept, and its memory is needed
        return train(
            model,
            self.teacher,
            BlockDataset(text.tokens[held:], cache, held),
            BlockDataset(text.tokens[:held], cache),
            settings,
            run,
            self.progress,
        )

    def inputs(self) -> list[Any]:
        asked = self.settings.model_dump(mode="json", exclude={"tensorboard", "teacher_cache"})
        cached = self.settings.teacher_cache is not None  # its loss is another one, wherever it is
        return [fingerprints.model_inputs(self.source), asked, cached]

    def _cache(self, text: Text) -> TeacherCache | None:
        """The teacher's predictions for all sequences, if they are kept; made where missing."""
        settings = self.settings
        if settings.teacher_cache is None:
            return None
        kept = (settings.teacher_top_k, settings.temperature, autocast(self.teacher, settings))
        inputs = [fingerprints.model_inputs(self.dense), text.mark["sha256"], kept]
        folder = Path(settings.teacher_cache) / fingerprints.digest(inputs)[:16]
        cache = TeacherCache(folder, *kept)
        missing = from_main(lambda: cache.missing(len(text.tokens)))
        own = distributed.own_part(missing)
        agreed(lambda: cache.fill(self.teacher, text.tokens, own, self.progress))
        return cache


def check_settings(settings: FinetuneSettings, device: str) -> None:
    """Raises InputError for what cannot work on this machine, before anything is loaded."""
    job.check_settings(settings, device, Finetuning.command)
    if settings.train == "lora":
        check_package("peft", "lora")
