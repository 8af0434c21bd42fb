"""Reads the calibration text and measures moments on it: each once, when first needed."""

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
from lrcompress.data.calibration_text import CalibrationText, calibration_text
from lrcompress.data.packing import Fingerprint
from lrcompress.layers.model_info import check_predicts_next_token
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.progress import Progress, silent
from lrcompress.runtime.stage_costs import stage


class CalibrationSession:
    """The calibration text of one model and the moments measured on it, both made on first use.

    `text_seconds` is the time that reading the text took. `moment_seconds` are the times that
    measuring took, by whether it included gradients.
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
        self.text_seconds = 0.0
        self.moment_seconds: dict[bool, float] = {}
        self._moments: dict[bool, MomentStatistics] = {}

    @cached_property
    def _text(self) -> CalibrationText:
        check_predicts_next_token(self.model, "calibration")
        started = time.perf_counter()
        with stage("text"):
            text = run_on_main(lambda: self._read_text(self.model))
        self.text_seconds = time.perf_counter() - started
        return text

    def _read_text(self, model: Any) -> CalibrationText:
        return calibration_text(model, self.tokenizer, self.settings, self.progress)

    @property
    def tokens(self) -> Tensor:
        """Token ids (num_samples, seq_len)."""
        return self._text.tokens

    @property
    def labels(self) -> Tensor | None:
        """The labels (num_samples, seq_len) where not all tokens count; None otherwise."""
        return None if self.settings.loss_on == "all" else self._text.labels

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the text; None while no stage has read it."""
        return self._text.fingerprint if "_text" in vars(self) else None

    def moments(self, gradients: bool) -> MomentStatistics:
        """Moments of all samples; with `gradients`, of those that are not held out for probes."""
        if gradients not in self._moments:
            tokens, started = self.tokens, time.perf_counter()
            if gradients:
                tokens = tokens[: held_out(len(tokens)).start]
            samples = self.settings.gradient_samples if gradients else 0
            self._moments[gradients] = measure_moments(
                self.model, self.linears, tokens, samples, self.progress, labels=self.labels
            )
            self.moment_seconds[gradients] = time.perf_counter() - started
        return self._moments[gradients]

    def errors(self, probes: Sequence[Probe]) -> dict[str, list[float]]:
        """The cost of each probe on every held-out sample, by the name of its linear."""
        tokens = self.tokens
        with stage("probes"):
            return run_on_main(
                lambda: measure_errors(self.model, probes, tokens, self.progress, self.labels)
            )
