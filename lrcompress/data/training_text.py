"""The text that training reads, as blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrcompress.config import TrainingSettings
from lrcompress.data.corpora import read_corpus
from lrcompress.data.packing import fingerprint, interleave, token_blocks
from lrcompress.layers.model_info import sequence_length
from lrcompress.runtime.errors import InputError

TRAIN_LENGTH = 512


@dataclass(frozen=True)
class TrainingText:
    """Blocks (sequences, length), the held-out ones first, and what identifies them."""

    tokens: Tensor
    mark: dict[str, Any]


def training_text(
    model: Any, tokenizer: Any, settings: TrainingSettings, command: str
) -> TrainingText:
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
    blocks = interleave(parts)[:wanted]
    if len(blocks) < settings.held_out + each:
        raise InputError(
            f"{', '.join(settings.data)}: {len(blocks)} sequences of {length} tokens are too few "
            f"to hold {settings.held_out} out: give more text, or a smaller --held-out"
        )
    blocks = blocks[: len(blocks) - (len(blocks) - settings.held_out) % each]
    mark = fingerprint(settings.data, blocks, settings.seed)
    text = {"sequences": mark.num_samples, "length": length, "sha256": mark.sha256}
    return TrainingText(blocks, text | {"sketch": mark.sketch.to_dict()})
