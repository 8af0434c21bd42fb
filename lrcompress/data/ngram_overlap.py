"""Measures how much of one text is in another: compares the hashes of n-grams of 32 tokens.

A hash depends only on the n-gram's tokens, so it does not matter where blocks of tokens begin.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.runtime.errors import InputError

# tokens of an n-gram: longer than common phrases; a power of two
NGRAM_LENGTH = 32
# hashes in a sketch, of 4 bytes each
SKETCH_SIZE = 8192
# rows hashed at a time, so that intermediate results fit into the processor's cache
ROWS_PER_CHUNK = 128
# a larger share of a text in another one is not a coincidence
TOLERATED_OVERLAP = 0.01
# odd numbers without a pattern in their bits: the fractions of the golden ratio and of pi
BASE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x243F6A8885A308D3)


@dataclass(frozen=True)
class Sketch:
    """A sample of a text's n-grams: those whose hash has its high half below `below`.

    With `below` = 2**32 these are all n-grams. `hashes` are the low halves of the hashes, uint32
    little-endian in base64. The hash alone decides whether an n-gram is in the sample, so equal
    passages of two texts are sampled equally.
    """

    below: int
    hashes: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sketch:
        """The inverse of `to_dict`; raises InputError where `values` are damaged."""
        try:
            result = cls(int(values["below"]), str(values["hashes"]))
            result.low_halves()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the sketch of a text in lrcompress.json is damaged ({error}): restore the file"
            ) from None
        return result

    def low_halves(self) -> np.ndarray:
        """The low halves of the sampled hashes, ascending, uint32."""
        return np.frombuffer(base64.b64decode(self.hashes), dtype="<u4")


def ngram_hashes(rows: Iterable[Tensor]) -> np.ndarray:
    """Hashes of all distinct n-grams inside token rows (..., length), ascending, uint64.

    The first token of each row is left out, because it may be BOS.
    """
    flat = (row.reshape(-1, row.shape[-1]) for row in rows)
    chunks = (chunk for row in flat for chunk in torch.split(row, ROWS_PER_CHUNK) if len(chunk))
    hashes = [_hashes(chunk.numpy()[:, 1:]).ravel() for chunk in chunks]
    return _distinct(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending; by sorting, which is much faster here than np.unique."""
    ordered = np.sort(values)
    distinct: np.ndarray = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return distinct


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """One uint64 for each window of NGRAM_LENGTH tokens along the last axis.

    It is a polynomial of the tokens modulo 2**64. The value of a window follows from those of its
    two halves, so that 32 tokens take 5 passes.
    """
    values, power, width = _mixed(tokens.astype(np.uint64)), BASE, 1
    while width < NGRAM_LENGTH:
        values = values[..., :-width] * power + values[..., width:]
        power, width = np.multiply(power, power), 2 * width
    return _mixed(values)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Makes every bit depend on all bits: the low bits of a product depend on low bits only."""
    values = (values + BASE) * MIX
    for _ in range(2):
        values = (values ^ (values >> np.uint64(32))) * BASE
    mixed: np.ndarray = values ^ (values >> np.uint64(29))
    return mixed


def sketch(hashes: np.ndarray) -> Sketch:
    """A sample of at most SKETCH_SIZE of the `hashes`, which are those of `ngram_hashes`."""
    high = hashes >> np.uint64(32)
    below = int(high[SKETCH_SIZE]) if len(hashes) > SKETCH_SIZE else 2**32
    low = _distinct(hashes[high < below].astype("<u4"))
    return Sketch(below, base64.b64encode(low.tobytes()).decode())


def overlap_share(hashes: np.ndarray, other: Sketch) -> float:
    """The share of a text, given by its `ngram_hashes`, that is also in the text of `other`.

    0 where fewer than two n-grams are in both, which may be a coincidence.
    """
    sampled = hashes[(hashes >> np.uint64(32)) < other.below].astype("<u4")
    matches = np.count_nonzero(np.isin(sampled, other.low_halves()))
    return matches / len(sampled) if matches > 1 else 0.0
