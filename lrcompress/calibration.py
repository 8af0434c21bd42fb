"""The text on which a run calibrates, and the moments measured on it: each once, when needed."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lrcompress.calibrate import Moments, measure_moments
from lrcompress.data import SELF, Fingerprint, bos_token, read_corpus, token_blocks
from lrcompress.protocols import InputError, LinearSpec, Progress, silent
from lrcompress.sampling import sampled_blocks
from lrcompress.settings import CalibrationSettings
from lrcompress.sizes import sequence_length

# samples where the user names no number: writing them costs more than reading them
READ_SAMPLES, WRITTEN_SAMPLES = 60, 20


class Calibration:
    """Tokens and moments of one model; whatever stage asks first has them made."""

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
        self.read = False
        self._moments: Moments | None = None

    @cached_property
    def _text(self) -> tuple[Tensor, Fingerprint]:
        found = calibration_tokens(self.model, self.tokenizer, self.settings, self.progress)
        self.read = True
        return found

    @property
    def tokens(self) -> Tensor:
        """Shape (num_samples, seq_len)."""
        return self._text[0]

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the text, if any stage has read it."""
        return self._text[1] if self.read else None

    def moments(self, gradients: bool) -> Moments:
        """With gradients, or with or without them."""
        known = self._moments
        if known is None or (gradients and not known.gradient_tokens):
            samples = self.settings.gradient_samples if gradients else 0
            known = measure_moments(self.model, self.linears, self.tokens, samples, self.progress)
            self._moments = known
        return known


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
    wanted = settings.num_samples
    count = wanted or (WRITTEN_SAMPLES if set(settings.data) == {SELF} else READ_SAMPLES)
    texts = settings.data[:count]
    parts = []
    for index, spec in enumerate(texts):
        share = len(range(index, count, len(texts)))
        if spec == SELF:
            bos = bos_token(tokenizer)
            parts.append(sampled_blocks(model, bos, share, length, settings.seed, progress))
        else:
            corpus, fewer = read_corpus(spec, "calibration"), wanted is None
            parts.append(token_blocks(corpus, tokenizer, share, length, settings.seed, fewer))
    turns = range(max(map(len, parts)))
    blocks = torch.stack([part[turn] for turn in turns for part in parts if turn < len(part)])
    count = len(blocks)
    digest = hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()
    name = ",".join(texts)
    return blocks, Fingerprint(name, count, length, settings.seed, blocks.numel(), digest)
