"""Builds the token blocks that training reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrcompress.config import FinetuneSettings, TrainingSettings
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.corpora import read_corpus
from lrcompress.data.packing import Packing, fingerprint, interleave, labelled_blocks
from lrcompress.layers.model_info import sequence_length
from lrcompress.layers.token_ids import check_token_ids
from lrcompress.runtime.errors import InputError

# tokens of a sequence where the user gives no length
DEFAULT_TRAIN_LENGTH = 512
# A training that ends by time gets text for this number of steps in each second, and for at most so
# many tokens. If it trains faster or longer, it reads its text again.
TIMED_STEPS_PER_SECOND = 10
MAX_TIMED_TOKENS = 2**25


@dataclass(frozen=True)
class TrainingText:
    """Token blocks and their labels (sequences, length), the held-out ones first.

    `fingerprint` identifies them in lrcompress.json: sequences, length, sha256 and sketch.
    """

    tokens: Tensor
    labels: Tensor
    fingerprint: dict[str, Any]


def training_text(
    model: Any, tokenizer: Any, settings: TrainingSettings, command: str
) -> TrainingText:
    """As many sequences as the steps need, or as many whole steps as the texts hold.

    Training reads the latter more than once. If time ends the training, the text is for more steps
    than it is expected to take. Raises InputError without a tokenizer, where the texts are too
    short, and where the model lacks a token. `command` is named in the error.
    """
    if tokenizer is None:
        raise InputError(f"{command} reads text, but the model has no tokenizer: add its files")
    length = sequence_length(model, settings.train_length)
    if settings.train_length is None:
        length = min(length, DEFAULT_TRAIN_LENGTH)
    batch_size = settings.batch_size
    needed = settings.held_out + _steps_of_text(settings, length) * batch_size
    share = -(-needed // len(settings.data))
    loss_on = settings.loss_on if isinstance(settings, FinetuneSettings) else "all"
    chat = ChatFormat.from_setting(tokenizer, settings.chat_template, loss_on)
    packing = Packing(share, length, settings.seed, True, loss_on)
    texts = [
        labelled_blocks(read_corpus(spec, "calibration", chat), tokenizer, packing)
        for spec in settings.data
    ]
    blocks, labels = (interleave(part)[:needed] for part in zip(*texts, strict=True))
    check_token_ids(model, blocks)
    if len(blocks) < settings.held_out + batch_size:
        raise InputError(
            f"{', '.join(settings.data)}: {len(blocks)} sequences of {length} tokens are too few "
            f"to hold {settings.held_out} out: give more text, or a smaller --held-out"
        )
    incomplete_step = (len(blocks) - settings.held_out) % batch_size
    blocks = blocks[: len(blocks) - incomplete_step]
    labels = labels[: len(blocks)]
    identity = fingerprint(settings.data, blocks, settings.seed)
    return TrainingText(
        blocks,
        labels,
        {
            "sequences": identity.num_samples,
            "length": length,
            "sha256": identity.sha256,
            "sketch": identity.sketch.to_dict(),
        },
    )


def _steps_of_text(settings: TrainingSettings, length: int) -> int:
    """The number of steps to read text for, in sequences of `length` tokens."""
    if settings.minutes is None:
        return settings.step_limit
    most = MAX_TIMED_TOKENS // (settings.batch_size * length)
    return max(1, min(math.ceil(60 * settings.minutes * TIMED_STEPS_PER_SECOND), most))
