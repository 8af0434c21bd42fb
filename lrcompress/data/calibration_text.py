"""Builds the token blocks that calibration reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrcompress.config import CalibrationSettings
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.corpora import SELF, read_corpus
from lrcompress.data.generated import sampled_blocks
from lrcompress.data.packing import (
    Fingerprint,
    Packing,
    bos_token,
    fingerprint,
    interleave,
    token_blocks,
)
from lrcompress.layers.model_info import sequence_length
from lrcompress.layers.token_ids import check_token_ids, notice_missing_rows
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


def calibration_tokens(
    model: Any, tokenizer: Any, settings: CalibrationSettings, progress: Progress = silent
) -> tuple[Tensor, Fingerprint]:
    """Calibration tokens for `model`, shape (num_samples, seq_len), and their fingerprint.

    Several texts give equal numbers of samples, which alternate. Where the settings have no number
    of samples, a text that is too short for its share of the default gives what it has. Raises
    InputError without a tokenizer, where a text is too short, and where the model lacks a token.
    """
    if tokenizer is None:
        raise InputError(
            "calibration reads text, but the model has no tokenizer: add the tokenizer's files to "
            "its folder (in Python: pass tokenizer=), or use --method svd, which reads no text"
        )
    length = sequence_length(model, settings.seq_len)
    blocks = interleave(
        [
            sampled_blocks(model, bos_token(tokenizer), count, length, settings.seed, progress)
            if spec == SELF
            else _text_blocks(spec, tokenizer, settings, count, length)
            for spec, count in _sample_counts(settings)
        ]
    )
    check_token_ids(model, blocks)
    notice_missing_rows(model, tokenizer)
    return blocks, fingerprint(settings.data, blocks, settings.seed)


def read_blocks(model: Any, tokenizer: Any, settings: CalibrationSettings) -> list[Tensor]:
    """The blocks (samples, seq_len) that calibration will read, one tensor for each text.

    Text that the model itself would write is left out, so `model` needs no weights.
    """
    length = sequence_length(model, settings.seq_len)
    texts = [
        _text_blocks(spec, tokenizer, settings, count, length)
        for spec, count in _sample_counts(settings)
        if spec != SELF
    ]
    for blocks in texts:
        check_token_ids(model, blocks)
    return texts


def _sample_counts(settings: CalibrationSettings) -> list[tuple[str, int]]:
    """SPEC and number of samples of each text."""
    texts = settings.data
    most = settings.max_generated_samples if set(texts) == {SELF} else settings.max_samples
    total = settings.num_samples or most
    if total < len(texts):
        raise InputError(f"{len(texts)} texts cannot share {total} samples: raise --num-samples")
    return [(spec, len(range(index, total, len(texts)))) for index, spec in enumerate(texts)]


def _text_blocks(
    spec: str, tokenizer: Any, settings: CalibrationSettings, count: int, length: int
) -> Tensor:
    """`count` blocks of one text, (samples, length); or fewer where the user gave no number."""
    chat = ChatFormat.from_setting(tokenizer, settings.chat_template)
    packing = Packing(count, length, settings.seed, allow_fewer=settings.num_samples is None)
    return token_blocks(read_corpus(spec, "calibration", chat), tokenizer, packing)
