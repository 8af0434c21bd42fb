"""Token blocks: exact pieces of the text, chosen by the seed, with BOS and EOS in place."""

from __future__ import annotations

import pytest
import torch

from lrcompress.data.corpora import Corpus
from lrcompress.data.packing import (
    Packing,
    bos_token,
    encode,
    token_blocks,
)
from lrcompress.runtime.errors import InputError
from tests.tiny import byte_tokenizer


def test_blocks_are_exact_disjoint_pieces_of_the_text() -> None:
    text = "".join(chr(ord("a") + i % 26) + str(i) for i in range(400))
    tokenizer = byte_tokenizer()
    stream = encode(tokenizer, text)
    blocks = token_blocks(Corpus("x", [text]), tokenizer, Packing(8, 32, 0))
    pieces = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    assert blocks.shape == (8, 32)
    rows = [block.tolist() for block in blocks]
    assert all(row in pieces for row in rows)
    assert len({tuple(row) for row in rows}) == 8


def test_seed_decides() -> None:
    corpus, tokenizer = Corpus("x", ["some words of text " * 50]), byte_tokenizer()
    first = token_blocks(corpus, tokenizer, Packing(4, 31, 0))
    assert torch.equal(first, token_blocks(corpus, tokenizer, Packing(4, 31, 0)))
    assert not torch.equal(first, token_blocks(corpus, tokenizer, Packing(4, 31, 1)))


def test_documents_are_separated_by_eos() -> None:
    blocks = token_blocks(Corpus("x", ["abc", "def"]), byte_tokenizer(), Packing(1, 7, 0))
    assert blocks[0].tolist().index(0) == 3


def test_bos_starts_every_block_where_the_tokenizer_uses_it() -> None:
    tokenizer = byte_tokenizer(bos=True)
    assert bos_token(tokenizer) == 0
    assert bos_token(byte_tokenizer()) is None
    blocks = token_blocks(Corpus("x", ["word " * 40]), tokenizer, Packing(3, 16, 0))
    assert blocks[:, 0].tolist() == [0, 0, 0]
    assert bool((blocks[:, 1:] != 0).all())


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(InputError, match=r"holds 9 tokens, 2 samples of 8 need 16.*samples 1"):
        token_blocks(Corpus("x", ["123456789"]), byte_tokenizer(), Packing(2, 8, 0))
