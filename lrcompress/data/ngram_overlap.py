"""How much of one text's tokens stands in another: shingles of 32 tokens, compared by their hashes.

A shingle's hash depends on its tokens alone, so two texts are compared wherever their blocks begin.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lrcompress.runtime.errors import InputError

# tokens in a shingle: long enough that set phrases are none; a power of two
SHINGLE = 32
# hashes that a sketch keeps: 4 bytes each, beside the weights they are nothing
SKETCH = 8192
# rows hashed at a time, so that what lies between stays in the processor's cache
CHUNK = 128
# a larger share of a text found in another is no coincidence
TOLERATED = 0.01
# odd numbers without a pattern in their bits, from the fraction of the golden ratio and of pi
BASE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x243F6A8885A308D3)


@dataclass(frozen=True)
class Sketch:
    """The shingles of a text whose hash has a high half below `below`; all of them if 2**32.

    `hashes` are their low halves, uint32 little-endian in base64. What is sampled is decided by
    the hash alone, so the same passage is sampled alike in every text.
    """

    below: int
    hashes: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Sketch:
        """What `to_dict` gave; InputError if it is damaged."""
        try:
            found = cls(int(known["below"]), str(known["hashes"]))
            found.low_halves()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the sketch of a text in lrcompress.json is damaged ({error}): restore the file"
            ) from None
        return found

    def low_halves(self) -> np.ndarray:
        """Ascending, uint32."""
        return np.frombuffer(base64.b64decode(self.hashes), dtype="<u4")


def ngram_hashes(rows: Iterable[Tensor]) -> np.ndarray:
    """Hashes of all distinct shingles inside token rows (..., length), ascending, uint64.

    The first token of each row is left out: it is BOS, or one of very many.
    """
    flat = (row.reshape(-1, row.shape[-1]) for row in rows)
    pieces = [row[begin : begin + CHUNK] for row in flat for begin in range(0, len(row), CHUNK)]
    found = [_hashes(piece.numpy()[:, 1:]).ravel() for piece in pieces]
    return _distinct(np.concatenate(found)) if found else np.empty(0, np.uint64)


def _distinct(values: np.ndarray) -> np.ndarray:
    """Ascending; by sorting, which is many times faster here than numpy's hash table."""
    ordered = np.sort(values)
    distinct: np.ndarray = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return distinct


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """One uint64 for each window of SHINGLE tokens in the last axis.

    A polynomial of the tokens modulo 2**64: the value of a window twice as long is made of those
    of its halves, so that 32 tokens take 5 passes.
    """
    values, power, width = _mixed(tokens.astype(np.uint64)), BASE, 1
    while width < SHINGLE:
        values = values[..., :-width] * power + values[..., width:]
        power, width = np.multiply(power, power), 2 * width
    return _mixed(values)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over all: products modulo 2**64 alone leave low bits to low bits."""
    values = (values + BASE) * MIX
    for _ in range(2):
        values = (values ^ (values >> np.uint64(32))) * BASE
    mixed: np.ndarray = values ^ (values >> np.uint64(29))
    return mixed


def sketch(hashes: np.ndarray) -> Sketch:
    """A sample of `ngram_hashes`, of bounded size."""
    high = hashes >> np.uint64(32)
    below = int(high[SKETCH]) if len(hashes) > SKETCH else 2**32
    low = _distinct(hashes[high < below].astype("<u4"))
    return Sketch(below, base64.b64encode(low.tobytes()).decode())


def overlap_share(hashes: np.ndarray, known: Sketch) -> float:
    """The share of a text, given by its `ngram_hashes`, that the text of `known` holds too.

    0 where the sample is too small to tell: less than two shingles were found.
    """
    sampled = hashes[(hashes >> np.uint64(32)) < known.below].astype("<u4")
    found = np.count_nonzero(np.isin(sampled, known.low_halves()))
    return found / len(sampled) if found > 1 else 0.0
