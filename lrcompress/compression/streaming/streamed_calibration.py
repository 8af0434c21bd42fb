"""The calibration text of a streamed model, some of which the whole model may have to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.config.recipe import Recipe
from lrcompress.data.calibration_text import CalibrationText
from lrcompress.data.corpora import SELF
from lrcompress.data.packing import fingerprint
from lrcompress.methods.types import LinearSpec
from lrcompress.models.loading import load_model
from lrcompress.models.offload import OffloadedModel
from lrcompress.models.placement import free_memory
from lrcompress.runtime.atomic_io import replace_tensors, writing_state
from lrcompress.runtime.errors import MachineError
from lrcompress.runtime.memory import gibibytes
from lrcompress.runtime.progress import Progress

TEXT_FILE = "text.safetensors"


class StreamedCalibration(CalibrationSession):
    """Text that the model writes takes the whole model, which is in memory for that time alone.

    `writing_bytes` is the memory of that. The text is kept in the folder `work`, so that a run that
    resumes does not write it again.
    """

    def __init__(
        self,
        recipe: Recipe,
        offloaded: OffloadedModel,
        linears: tuple[LinearSpec, ...],
        writing_bytes: int,
        work: Path,
        progress: Progress,
    ) -> None:
        model, tokenizer = offloaded.model, offloaded.tokenizer
        super().__init__(model, tokenizer, linears, recipe.calibration, progress)
        self.source, self.writing_bytes, self.file = recipe.model, writing_bytes, work / TEXT_FILE

    def _read_text(self, model: Any) -> CalibrationText:
        """Raises MachineError where the whole model does not fit in memory."""
        if SELF not in self.settings.data:
            return super()._read_text(model)
        if self.file.is_file():
            blocks = load_file(self.file)
            identity = fingerprint(self.settings.data, blocks["tokens"], self.settings.seed)
            return CalibrationText(**blocks, fingerprint=identity)
        whole, _ = load_model(self.source, device=self._writing_device())
        text = super()._read_text(whole)
        with writing_state(f"the calibration text in {str(self.file.parent)!r}"):
            # a safetensors file wants tensors that share no memory
            blocks = {"tokens": text.tokens, "labels": text.labels.clone()}
            replace_tensors(self.file, blocks)
        return text

    def _writing_device(self) -> str:
        """The device of the blocks, or the CPU where only that has the memory."""
        for device in (str(self.model.device), "cpu"):
            if self.writing_bytes <= free_memory(device):
                return device
        raise MachineError(
            "to write calibration text, the whole model has to be in memory, which takes about "
            f"{gibibytes(self.writing_bytes)}, and {gibibytes(free_memory('cpu'))} are free: name "
            "a text with --calibration, such as pydoc or FILE.txt"
        )
