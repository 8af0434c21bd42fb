"""The text that calibration reads, as blocks of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrcompress.config import CalibrationSettings
from lrcompress.data.corpora import SELF, read_corpus
from lrcompress.data.generated import sampled_blocks
from lrcompress.data.packing import Fingerprint, bos_token, fingerprint, interleave, token_blocks
from lrcompress.layers.model_info import sequence_length
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent

# samples where the user names no number: writing them costs more than reading them
READ_SAMPLES, WRITTEN_SAMPLES = 50, 20


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
    blocks = interleave(parts)
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
