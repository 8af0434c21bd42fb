"""Text becomes tokens: packed blocks, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.data.corpora import Corpus
from lrcompress.data.ngram_overlap import Sketch, ngram_hashes, sketch
from lrcompress.runtime.errors import InputError

# tokens read for every token asked for, so that the seed has something to choose from, and how
# many are read at most for that: beyond it a large set is read no further than it is needed
OVERDRAW, OVERDRAWN = 8, 2**24


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the tokens that a stage used: equal hashes mean equal tokens in equal order.

    `sketch` is a sample of them, by which another text that holds them is found out.
    """

    data: str
    num_samples: int
    seq_len: int
    seed: int
    tokens: int
    sha256: str
    sketch: Sketch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: no BOS, EOS or chat template."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def bos_token(tokenizer: Any) -> int | None:
    """The id that `tokenizer` itself puts in front of a text, or None if it puts none."""
    ids, bare = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(ids) > len(bare) and ids[0] == bos else None


def token_blocks(
    corpus: Corpus,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
    fewer: bool = False,
) -> Tensor:
    """Packed token blocks, shape (num_samples, seq_len), chosen by `seed` without overlap.

    Documents follow one another with the EOS token between them. Every block starts with BOS
    where the tokenizer uses one. Raises InputError where there is too little text; where `fewer`
    will do, one block is enough.
    """
    bos = bos_token(tokenizer)
    length = seq_len if bos is None else seq_len - 1
    wanted = num_samples * length
    stream = _token_stream(corpus, tokenizer, max(wanted, min(OVERDRAW * wanted, OVERDRAWN)))
    available = len(stream) // length
    least = 1 if fewer else num_samples
    if available < least:
        remedy = f"at most --num-samples {available}" if available else "a shorter --seq-len"
        raise InputError(
            f"{corpus.spec!r} holds {len(stream)} tokens, {least} of the samples of "
            f"{seq_len} need {least * length}: give more text, or {remedy}"
        )
    num_samples = min(num_samples, available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    blocks = stream[: available * length].view(available, length)[order[:num_samples]]
    if bos is not None:
        blocks = torch.cat([torch.full((num_samples, 1), bos), blocks], dim=1)
    return blocks


def interleave(parts: Sequence[Tensor]) -> Tensor:
    """Blocks (samples, length) of several texts, one of each after the other while they last."""
    turns = range(max(map(len, parts)))
    return torch.stack([part[turn] for turn in turns for part in parts if turn < len(part)])


def fingerprint(specs: Sequence[str], blocks: Tensor, seed: int) -> Fingerprint:
    """Of the blocks (samples, length) that were taken from the texts `specs`."""
    samples, length = blocks.shape
    mark, sample = token_hash(blocks), sketch(ngram_hashes([blocks]))
    return Fingerprint(",".join(specs), samples, length, seed, blocks.numel(), mark, sample)


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of token ids, whatever their shape."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _token_stream(corpus: Corpus, tokenizer: Any, enough: int) -> Tensor:
    """At least `enough` tokens, if the corpus has them, (tokens,); read document by document."""
    parts: list[np.ndarray] = []
    count = 0
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, document in enumerate(corpus.documents):
        ids = (separator if index else []) + encode(tokenizer, document)
        parts.append(np.array(ids, dtype=np.int32))  # lists of numbers would take eight times that
        count += len(ids)
        if count >= enough:
            break
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.int32)).long()
