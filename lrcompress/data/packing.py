"""Packs the tokens of a text into blocks of one length, and fingerprints the blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.data.ngram_overlap import Sketch, ngram_hashes, sketch
from lrcompress.runtime.errors import InputError

if TYPE_CHECKING:
    from lrcompress.data.corpora import Corpus

# tokens read for each token needed, so that the seed can choose among blocks
OVERDRAW_FACTOR = 8
# with more tokens than this, a corpus is only read as far as needed
MAX_OVERDRAWN_TOKENS = 2**24


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the tokens that a stage used: equal hashes mean equal tokens in equal order.

    `data` names the texts; `sketch` is a sample of the n-grams, by which an overlap with another
    text can be measured.
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
    """The id that `tokenizer` puts in front of every text, or None."""
    ids, text_ids = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(ids) > len(text_ids) and ids[0] == bos else None


def token_blocks(
    corpus: Corpus,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
    allow_fewer: bool = False,
) -> Tensor:
    """Packed token blocks (num_samples, seq_len) that do not overlap, chosen by `seed`.

    Documents are joined with the EOS token between them. Every block starts with BOS where the
    tokenizer uses one. Raises InputError where there is too little text; with `allow_fewer` one
    block is enough.
    """
    bos = bos_token(tokenizer)
    length = seq_len if bos is None else seq_len - 1
    needed = num_samples * length
    overdrawn = min(OVERDRAW_FACTOR * needed, MAX_OVERDRAWN_TOKENS)
    stream = _token_stream(corpus, tokenizer, max(needed, overdrawn))
    available = len(stream) // length
    minimum = 1 if allow_fewer else num_samples
    if available < minimum:
        remedy = f"at most --num-samples {available}" if available else "a shorter --seq-len"
        raise InputError(
            f"{corpus.spec!r} holds {len(stream)} tokens, {minimum} samples of {seq_len} "
            f"need {minimum * length}: give more text, or {remedy}"
        )
    num_samples = min(num_samples, available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    blocks = stream[: available * length].view(available, length)[order[:num_samples]]
    if bos is not None:
        blocks = torch.cat([torch.full((num_samples, 1), bos), blocks], dim=1)
    return blocks


def interleave(texts: Sequence[Tensor]) -> Tensor:
    """Joins the blocks (samples, length) of several texts: first of each, second of each, ..."""
    longest = max(map(len, texts))
    return torch.stack([text[i] for i in range(longest) for text in texts if i < len(text)])


def fingerprint(specs: Sequence[str], blocks: Tensor, seed: int) -> Fingerprint:
    """The fingerprint of blocks (samples, length) from the texts `specs`."""
    samples, length = blocks.shape
    return Fingerprint(
        data=",".join(specs),
        num_samples=samples,
        seq_len=length,
        seed=seed,
        tokens=blocks.numel(),
        sha256=token_hash(blocks),
        sketch=sketch(ngram_hashes([blocks])),
    )


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of token ids; it does not depend on their shape."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _token_stream(corpus: Corpus, tokenizer: Any, minimum: int) -> Tensor:
    """Token ids (tokens,) of whole documents, until they are at least `minimum`."""
    documents: list[np.ndarray] = []
    count = 0
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, document in enumerate(corpus.documents):
        ids = (separator if index else []) + encode(tokenizer, document)
        documents.append(np.array(ids, dtype=np.int32))  # a list would take 8 times the memory
        count += len(ids)
        if count >= minimum:
            break
    stream = np.concatenate(documents) if documents else np.empty(0, np.int32)
    return torch.from_numpy(stream).long()
