"""The text of a scaling study: one order of training sequences for all models, and a test text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.config.recipe import ScalingRecipe
from lrcompress.data.corpora import Use, read_corpus
from lrcompress.data.ngram_overlap import TOLERATED_OVERLAP, ngram_hashes
from lrcompress.data.packing import interleave, token_blocks
from lrcompress.runtime.errors import InputError

# chooses and orders the sequences: the same for every model, whatever its seed
ORDER = 0


@dataclass(frozen=True)
class ScalingText:
    """Blocks (sequences, length). A training takes as many of the first as it needs, and begins
    again where there are fewer."""

    training: Tensor
    test: Tensor


def scaling_text(recipe: ScalingRecipe, tokenizer: Any, sequences: int, length: int) -> ScalingText:
    """Raises InputError where there is too little text, and where a test text is trained on."""
    data, asked = recipe.pretrain.data, recipe.scaling
    training = _blocks(data, "calibration", tokenizer, sequences, length)
    tests = asked.test or data
    share = -(-asked.test_sequences // len(tests))
    parts = [_blocks([spec], "test", tokenizer, share, length) for spec in tests]
    known = ngram_hashes([training])
    for spec, part in zip(tests, parts, strict=True):
        found = ngram_hashes([part])
        seen = float(np.isin(found, known, assume_unique=True).mean()) if len(found) else 0.0
        if seen > TOLERATED_OVERLAP:
            raise InputError(
                f"{seen:.1%} of the test text {spec!r} is in the text that is trained on: name "
                "another text as scaling.test"
            )
    return ScalingText(training, torch.cat(parts))


def _blocks(specs: Sequence[str], use: Use, tokenizer: Any, sequences: int, length: int) -> Tensor:
    share = -(-sequences // len(specs))
    parts = [
        token_blocks(read_corpus(spec, use), tokenizer, share, length, ORDER, allow_fewer=True)
        for spec in specs
    ]
    return interleave(parts)[:sequences]
