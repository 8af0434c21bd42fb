"""The text on which a run calibrates, and the moments measured on it: each once, when needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from lrcompress.compression.calibration.moments import (
    MomentStatistics,
    measure_errors,
    measure_moments,
)
from lrcompress.compression.calibration.probes import Probe, held_out
from lrcompress.config import CalibrationSettings
from lrcompress.data.calibration_text import calibration_tokens
from lrcompress.data.packing import Fingerprint
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.progress import Progress, silent


class CalibrationSession:
    """Tokens and moments of one model; whatever stage asks first has them made.

    `reading` are the seconds that the text took, `measuring` those of moments, with gradients or
    without.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        linears: tuple[LinearSpec, ...],
        settings: CalibrationSettings,
        progress: Progress = silent,
    ) -> None:
        self.model, self.tokenizer, self.linears = model, tokenizer, linears
        self.settings, self.progress = settings, progress
        self.reading = 0.0
        self.measuring: dict[bool, float] = {}
        self._moments: dict[bool, MomentStatistics] = {}

    @cached_property
    def _text(self) -> tuple[Tensor, Fingerprint]:
        started = time.perf_counter()
        parts = (self.model, self.tokenizer, self.settings, self.progress)
        found = run_on_main(lambda: calibration_tokens(*parts))
        self.reading = time.perf_counter() - started
        return found

    @property
    def tokens(self) -> Tensor:
        """Shape (num_samples, seq_len)."""
        return self._text[0]

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the text, if any stage has read it."""
        return self._text[1] if "_text" in vars(self) else None

    def moments(self, gradients: bool) -> MomentStatistics:
        """Of all samples; or, with gradients, of those that are not held out for probes."""
        if gradients not in self._moments:
            tokens, started = self.tokens, time.perf_counter()
            if gradients:
                tokens = tokens[: held_out(len(tokens)).start]
            samples = self.settings.gradient_samples if gradients else 0
            found = measure_moments(self.model, self.linears, tokens, samples, self.progress)
            self._moments[gradients] = found
            self.measuring[gradients] = time.perf_counter() - started
        return self._moments[gradients]

    def errors(self, probes: Sequence[Probe]) -> dict[str, list[float]]:
        """What `probes` cost on each sample that is held out, by the name of their linears."""
        parts = (self.model, probes, self.tokens, self.progress)
        return run_on_main(lambda: measure_errors(*parts))
