"""The text on which a run calibrates, and the moments measured on it: each once, when needed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from lrcompress.compression.calibration.moments import Moments, measure_errors, measure_moments
from lrcompress.compression.calibration.probes import Probe, held_out
from lrcompress.config import CalibrationSettings
from lrcompress.data.corpora import SELF, read_corpus
from lrcompress.data.generated import sampled_blocks
from lrcompress.data.packing import Fingerprint, bos_token, fingerprint, in_turn, token_blocks
from lrcompress.layers.model_info import sequence_length
from lrcompress.runtime.distributed import from_main
from lrcompress.runtime.protocols import InputError, LinearSpec, Progress, silent

# samples where the user names no number: writing them costs more than reading them
READ_SAMPLES, WRITTEN_SAMPLES = 50, 20


class Calibration:
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
        self._moments: dict[bool, Moments] = {}

    @cached_property
    def _text(self) -> tuple[Tensor, Fingerprint]:
        started = time.perf_counter()
        parts = (self.model, self.tokenizer, self.settings, self.progress)
        found = from_main(lambda: calibration_tokens(*parts))
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

    def moments(self, gradients: bool) -> Moments:
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
        return from_main(lambda: measure_errors(*parts))


def calibration_tokens(
    model: Any, tokenizer: Any, settings: CalibrationSettings, progress: Progress = silent
) -> tuple[Tensor, Fingerprint]:
    """Calibration tokens for `model`, shape (num_samples, seq_len), and their fingerprint.

    Several texts give equal shares, one sample after the other in turn. Where the settings name
    no number of samples, a text that holds fewer than the default gives all that it has.
    """
    if tokenizer is None:
        raise InputError(
            "calibration reads text and the model has no tokenizer: add the tokenizer's files to "
            "its folder (in Python: pass tokenizer=), or use --method svd, which reads none"
        )
    length = sequence_length(model, settings.seq_len)
    parts = [
        _blocks(spec, model, tokenizer, share, length, settings, progress)
        for spec, share in _shares(settings)
    ]
    blocks = in_turn(parts)
    return blocks, fingerprint(settings.data, blocks, settings.seed)


def read_blocks(model: Any, tokenizer: Any, settings: CalibrationSettings) -> list[Tensor]:
    """The blocks (samples, seq_len) that calibration will read; what the model would write is
    left out, so that a skeleton will do as `model`."""
    length = sequence_length(model, settings.seq_len)
    return [
        _blocks(spec, model, tokenizer, share, length, settings, silent)
        for spec, share in _shares(settings)
        if spec != SELF
    ]


def _shares(settings: CalibrationSettings) -> list[tuple[str, int]]:
    """SPEC and number of samples of each text."""
    count, texts = settings.num_samples, settings.data
    count = count or (WRITTEN_SAMPLES if set(texts) == {SELF} else READ_SAMPLES)
    if count < len(texts):
        raise InputError(f"{len(texts)} texts cannot share {count} samples: raise --num-samples")
    return [(spec, len(range(index, count, len(texts)))) for index, spec in enumerate(texts)]


def _blocks(
    spec: str,
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    settings: CalibrationSettings,
    progress: Progress,
) -> Tensor:
    if spec == SELF:
        return sampled_blocks(model, bos_token(tokenizer), count, length, settings.seed, progress)
    corpus, fewer = read_corpus(spec, "calibration"), settings.num_samples is None
    return token_blocks(corpus, tokenizer, count, length, settings.seed, fewer)
