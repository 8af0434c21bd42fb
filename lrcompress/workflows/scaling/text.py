"""The text of a scaling study: training sequences in one order for all models, and a test text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.config.recipe import ScalingRecipe
from lrcompress.data.conversations import ChatFormat
from lrcompress.data.corpora import Use, read_corpus
from lrcompress.data.ngram_overlap import TOLERATED_OVERLAP, ngram_hashes
from lrcompress.data.packing import Packing, interleave, token_blocks
from lrcompress.runtime.errors import InputError

# chooses and orders the sequences: the same for all models, whatever their own seeds
ORDER_SEED = 0


@dataclass(frozen=True)
class ScalingText:
    """Token blocks of shape (sequences, length).

    A training reads as many of the first blocks as it needs, and starts again from the first where
    there are fewer.
    """

    training: Tensor
    test: Tensor


def scaling_text(recipe: ScalingRecipe, tokenizer: Any, sequences: int, length: int) -> ScalingText:
    """At most `sequences` training blocks and the test blocks, each of `length` tokens.

    Raises InputError where there is too little text, and where a test text is trained on.
    """
    train_specs, scaling = recipe.pretrain.data, recipe.scaling
    chat = ChatFormat.from_setting(tokenizer, recipe.pretrain.chat_template)
    training = _blocks(train_specs, "calibration", chat, sequences, length)
    test_specs = scaling.test or train_specs
    share = -(-scaling.test_sequences // len(test_specs))
    tests = [_blocks([spec], "test", chat, share, length) for spec in test_specs]
    training_hashes = ngram_hashes([training])
    for spec, test in zip(test_specs, tests, strict=True):
        overlap = _overlap(ngram_hashes([test]), training_hashes)
        if overlap > TOLERATED_OVERLAP:
            raise InputError(
                f"{overlap:.1%} of the test text {spec!r} is in the text that is trained on: name "
                "another text as scaling.test"
            )
    return ScalingText(training, torch.cat(tests))


def _overlap(test_hashes: np.ndarray, training_hashes: np.ndarray) -> float:
    """The share of the test text's n-grams that the training text has; both hashes are unique."""
    if not len(test_hashes):
        return 0.0
    return float(np.isin(test_hashes, training_hashes, assume_unique=True).mean())


def _blocks(
    specs: Sequence[str], use: Use, chat: ChatFormat, sequences: int, length: int
) -> Tensor:
    """At most `sequences` blocks of `length` tokens, taken from the texts `specs` in turn."""
    share = -(-sequences // len(specs))
    corpora = [read_corpus(spec, use, chat) for spec in specs]
    packing = Packing(share, length, ORDER_SEED, allow_fewer=True)
    blocks = [token_blocks(corpus, chat.tokenizer, packing) for corpus in corpora]
    return interleave(blocks)[:sequences]
