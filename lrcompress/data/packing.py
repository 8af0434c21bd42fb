"""Packs the tokens of a text into blocks of one length, and fingerprints the blocks.

Labels are the tokens that a loss is a mean over, and `IGNORED` elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lrcompress.config.field_types import LossOn
from lrcompress.data.ngram_overlap import Sketch, ngram_hashes, sketch
from lrcompress.data.text import Conversation
from lrcompress.runtime.errors import InputError

if TYPE_CHECKING:
    from lrcompress.data.corpora import Corpus

# tokens read for each token needed, so that the seed can choose among blocks
OVERDRAW_FACTOR = 8
# with more tokens than this, a corpus is only read as far as needed
MAX_OVERDRAWN_TOKENS = 2**24
# the label of a token that does not count, as in torch
IGNORED = -100


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


def encode_with_labels(
    spec: str, tokenizer: Any, text: str, loss_on: LossOn
) -> tuple[list[int], list[int]]:
    """`encode`, and the labels of these tokens.

    A token that is partly in an answer belongs to it. Raises InputError, which names the data
    `spec`, where the answers of `text` are not known.
    """
    if loss_on == "all":
        ids = encode(tokenizer, text)
        return ids, ids
    answers = text.answers if isinstance(text, Conversation) else None
    if answers is None or not tokenizer.is_fast:
        reason = "its tokenizer does not tell places in a text"
        if not isinstance(text, Conversation):
            reason = "it holds text that is no conversation"
        elif answers is None:
            reason = "the chat template does not tell them: give one with {% generation %} blocks"
        raise InputError(f"the answers in {spec!r} are not known ({reason}), or use loss_on all")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    inside = [any(b < end and e > begin for begin, end in answers) for b, e in places]
    ids = encoded["input_ids"]
    return ids, [token if counts else IGNORED for token, counts in zip(ids, inside, strict=True)]


def bos_token(tokenizer: Any) -> int | None:
    """The id that `tokenizer` puts in front of every text, or None."""
    ids, text_ids = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    bos = tokenizer.bos_token_id
    return bos if bos is not None and len(ids) > len(text_ids) and ids[0] == bos else None


@dataclass(frozen=True)
class Packing:
    """How a text is packed: into `num_samples` blocks of `seq_len` tokens, chosen by `seed`.

    allow_fewer: whether one block is enough.
    loss_on: which tokens have labels. Blocks without any are left out.
    """

    num_samples: int
    seq_len: int
    seed: int
    allow_fewer: bool = False
    loss_on: LossOn = "all"


def token_blocks(corpus: Corpus, tokenizer: Any, packing: Packing) -> Tensor:
    """Packed token blocks (num_samples, seq_len) that do not overlap (see `labelled_blocks`)."""
    return labelled_blocks(corpus, tokenizer, packing)[0]


def labelled_blocks(corpus: Corpus, tokenizer: Any, packing: Packing) -> tuple[Tensor, Tensor]:
    """Packed token blocks that do not overlap, and their labels, both (num_samples, seq_len).

    Documents are joined with the EOS token between them. Every block starts with BOS where the
    tokenizer uses one; neither of these is an answer. Raises InputError where there is too little
    text.
    """
    bos = bos_token(tokenizer)
    length = packing.seq_len if bos is None else packing.seq_len - 1
    needed = packing.num_samples * length
    overdrawn = min(OVERDRAW_FACTOR * needed, MAX_OVERDRAWN_TOKENS)
    stream = _token_stream(corpus, tokenizer, max(needed, overdrawn), packing.loss_on)
    count = stream.shape[1] // length
    blocks = stream[:, : count * length].reshape(len(stream), count, length)
    if packing.loss_on != "all":
        first = int(bos is None)  # without BOS the first token of a block has no context
        blocks = blocks[:, (blocks[-1, :, first:] != IGNORED).any(dim=1)]
    _check_enough(corpus.spec, stream.shape[1], blocks.shape[1], packing, length)
    generator = torch.Generator().manual_seed(packing.seed)
    order = torch.randperm(blocks.shape[1], generator=generator)[: packing.num_samples]
    tokens, labels = blocks[0, order], blocks[-1, order]
    if bos is not None:
        start = torch.full((len(order), 1), bos)
        ignored = start if packing.loss_on == "all" else torch.full_like(start, IGNORED)
        tokens, labels = torch.cat([start, tokens], dim=1), torch.cat([ignored, labels], dim=1)
    return tokens, labels


def _check_enough(spec: str, tokens: int, available: int, packing: Packing, length: int) -> None:
    """Raises InputError where there are fewer blocks than `packing` needs."""
    minimum = 1 if packing.allow_fewer else packing.num_samples
    if available >= minimum:
        return
    remedy = f"at most --num-samples {available}" if available else "a shorter --seq-len"
    held = f"{tokens} tokens" if packing.loss_on == "all" else f"{available} samples with answers"
    raise InputError(
        f"{spec!r} holds {held}, {minimum} samples of {packing.seq_len} need "
        f"{minimum * length}: give more text, or {remedy}"
    )


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


def _token_stream(corpus: Corpus, tokenizer: Any, minimum: int, loss_on: LossOn) -> Tensor:
    """Ids, and labels where these differ, (1 or 2, tokens), of whole documents, until the tokens
    are at least `minimum`."""
    documents: list[np.ndarray] = []
    count = 0
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ignored = separator if loss_on == "all" else [IGNORED] * len(separator)
    for index, document in enumerate(corpus.documents):
        ids, labels = encode_with_labels(corpus.spec, tokenizer, document, loss_on)
        if index:
            ids, labels = separator + ids, ignored + labels
        rows = [ids] if loss_on == "all" else [ids, labels]
        documents.append(np.array(rows, np.int32))  # a list would take 8 times the memory
        count += len(ids)
        if count >= minimum:
            break
    stream = np.concatenate(documents, axis=1) if documents else np.empty((1, 0), np.int32)
    return torch.from_numpy(stream).long()
