"""Builds the token blocks that calibration reads."""

from __future__ import annotations

from dataclasses import dataclass
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
    labelled_blocks,
)
from lrcompress.layers.model_info import sequence_length
from lrcompress.layers.token_ids import check_token_ids, notice_missing_rows
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class CalibrationText:
    """Token blocks and their labels (samples, length), and the fingerprint of the tokens.

    The label of a token is the token, or IGNORED where its prediction does not count.
    """

    tokens: Tensor
    labels: Tensor
    fingerprint: Fingerprint


def calibration_text(
    model: Any, tokenizer: Any, settings: CalibrationSettings, progress: Progress = silent
) -> CalibrationText:
    """The text on which `model` is calibrated.

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
    texts: list[tuple[Tensor, Tensor]] = []
    for spec, count in _sample_counts(settings):
        if spec == SELF:
            bos = bos_token(tokenizer)
            written = sampled_blocks(model, bos, count, length, settings.seed, progress)
            texts.append((written, written))
        else:
            texts.append(_text_blocks(spec, tokenizer, settings, count, length))
    tokens, labels = (interleave(blocks) for blocks in zip(*texts, strict=True))
    check_token_ids(model, tokens)
    notice_missing_rows(model, tokenizer)
    return CalibrationText(tokens, labels, fingerprint(settings.data, tokens, settings.seed))


def read_blocks(model: Any, tokenizer: Any, settings: CalibrationSettings) -> list[Tensor]:
    """The blocks (samples, seq_len) that calibration will read, one tensor for each text.

    Text that the model itself would write is left out, so `model` needs no weights.
    """
    length = sequence_length(model, settings.seq_len)
    texts = [
        _text_blocks(spec, tokenizer, settings, count, length)[0]
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
) -> tuple[Tensor, Tensor]:
    """`count` blocks of one text and their labels, (samples, length) each; or fewer where the user
    gave no number."""
    loss_on = settings.loss_on
    chat = ChatFormat.from_setting(tokenizer, settings.chat_template, loss_on)
    packing = Packing(count, length, settings.seed, settings.num_samples is None, loss_on)
    return labelled_blocks(read_corpus(spec, "calibration", chat), tokenizer, packing)
